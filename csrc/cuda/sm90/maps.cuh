// Tensor maps, and the shared memory a kernel may have: what every launch of this tier asks of the driver.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include "../tile.h"
#include "ptx.h"

namespace sparse_attention::sm90 {
namespace {

template <class Function>
Function driver(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult status;
  cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &status);
  return reinterpret_cast<Function>(function);
}

auto encoder() {
  static const auto found = driver<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  return found;
}

auto replacer() {
  static const auto found = driver<decltype(&cuTensorMapReplaceAddress)>("cuTensorMapReplaceAddress");
  return found;
}

struct Sequences {
  CUtensorMapDataType type;
  int head_dim, heads, batch, length, stride;
};

// Boxes of 64 columns and `rows` rows of the sequences with floor(length / stride) steps, or of those with one more.
bool encode(CUtensorMap* map, const Strided& x, const Sequences& s, bool longer, int rows) {
  const int residues = longer ? s.length % s.stride : s.stride, steps = s.length / s.stride + longer;
  const cuuint64_t sizes[5] = {cuuint64_t(s.head_dim), cuuint64_t(std::max(1, residues)), cuuint64_t(std::max(1, steps)),
                               cuuint64_t(s.heads), cuuint64_t(s.batch)};
  const cuuint64_t strides[4] = {2 * cuuint64_t(x.row), 2 * cuuint64_t(x.row) * s.stride, 2 * cuuint64_t(x.head), 2 * cuuint64_t(x.batch)};
  const cuuint32_t box[5] = {64, 1, cuuint32_t(rows), 1, 1}, every[5] = {1, 1, 1, 1, 1};
  return encoder()(map, s.type, 5, x.data, sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Lets a kernel have so much shared memory, once for each device.
template <class Kernel>
cudaError_t allow(Kernel kernel, int bytes, std::atomic<uint64_t>& done) {
  int device;
  cudaError_t error = cudaGetDevice(&device);
  const uint64_t bit = uint64_t{1} << (device % 64);
  if (error != cudaSuccess || (device < 64 && done.load() & bit)) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) done.fetch_or(bit);
  return error;
}

}  // namespace
}  // namespace sparse_attention::sm90
