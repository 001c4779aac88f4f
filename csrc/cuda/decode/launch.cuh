// Host side of decoding with warp matrix products. No torch.
#pragma once
#include <cuda_runtime.h>

#include <atomic>

#include "join_launch.cuh"
#include "kernel.cuh"

namespace sparse_attention::decoding {
namespace {

// Once for each kernel and device: its shared memory, and clusters of sixteen.
template <class Kernel>
cudaError_t allow(Kernel kernel, int bytes, std::atomic<uint64_t>& allowed) {
  int device;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (device < 64 && allowed.load(std::memory_order_relaxed) >> device & 1) return cudaSuccess;
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return error;
  if (is_hopper_or_later())
    if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)) return error;
  if (device < 64) allowed |= uint64_t{1} << device;
  return cudaSuccess;
}

template <class S>
cudaError_t launch(const Decode& d, cudaStream_t stream) {
  static std::atomic<uint64_t> allowed{0};
  constexpr int kBytes = sizeof(Shared<S>);
  static_assert(kBytes <= 99 * 1024, "what a block may have on compute capability 8.6");
  if (const cudaError_t error = allow(decode<S>, kBytes, allowed)) return error;
  const int rows = d.group * d.q_len, tiles = (rows + S::kRows - 1) / S::kRows;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(d.splits, d.kv_heads * tiles, d.batch), config.blockDim = dim3(S::kThreads);
  config.dynamicSmemBytes = kBytes, config.stream = stream;
  cudaLaunchAttribute cluster[1];
  cluster[0].id = cudaLaunchAttributeClusterDimension;
  cluster[0].val.clusterDim = {unsigned(d.cluster), 1, 1};
  if (d.cluster > 1) config.attrs = cluster, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, decode<S>, d, tiles);
}

// Two warps share the keys of 16 rows where their outputs find room. float32 wider than 128 has half as many rows: their queries stay in
// shared memory.
template <typename T, int kDim>
cudaError_t launch(const Decode& d, DecodeKernel kernel, cudaStream_t stream) {
  constexpr int kRowBytes = kDim * sizeof(T);
  constexpr int kNarrowWarps = kDim <= 128 ? 4 : 2;
  if (kernel == DecodeKernel::kNarrow)
    return reads_once(d, 16) ? launch<Shape<T, kDim, 1, kNarrowWarps, true>>(d, stream) : launch<Shape<T, kDim, 1, kNarrowWarps>>(d, stream);
  if constexpr (kRowBytes <= 256 && sizeof(T) == 2)
    if (kernel == DecodeKernel::kMany) return launch<Shape<T, kDim, 4, 1>>(d, stream);
  return launch<Shape<T, kDim, (kRowBytes > 512 ? 2 : 4), (kRowBytes <= 256 ? 2 : 1)>>(d, stream);
}

template <typename T>
int run(const Decode& d, DecodeKernel kernel, cudaStream_t stream) {
  const cudaError_t error = d.head_dim <= 64    ? launch<T, 64>(d, kernel, stream)
                            : d.head_dim <= 128 ? launch<T, 128>(d, kernel, stream)
                                                : launch<T, 256>(d, kernel, stream);
  return error || d.splits == d.cluster ? error : launch_join<T>(d, stream);
}

}  // namespace
}  // namespace sparse_attention::decoding
