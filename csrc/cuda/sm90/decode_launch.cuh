// Host side of decoding on the sm90 tier. No torch.
#pragma once
#include "../decode/join_launch.cuh"
#include "../decode/plan.h"
#include "decode.cuh"
#include "maps.cuh"

namespace sparse_attention::sm90 {
namespace {

constexpr int kBlockBytes = 227 * 1024, kHalfBytes = 113 * 1024;  // of shared memory a block may have; two at once

// Queries or outputs in boxes of `rows` rows of one KV head.
bool encode_rows(CUtensorMap* map, const Strided& x, const Decode& d, CUtensorMapDataType type, int rows) {
  const cuuint64_t sizes[5] = {cuuint64_t(d.head_dim), cuuint64_t(d.group), cuuint64_t(d.q_len), cuuint64_t(d.kv_heads), cuuint64_t(d.batch)};
  const cuuint64_t strides[4] = {2 * cuuint64_t(x.head), 2 * cuuint64_t(x.row), 2 * cuuint64_t(x.head) * d.group, 2 * cuuint64_t(x.batch)};
  const cuuint32_t box[5] = {64, cuuint32_t(d.group), cuuint32_t(rows / d.group), 1, 1}, every[5] = {1, 1, 1, 1, 1};
  return encoder()(map, type, 5, x.data, sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <class S>
int row_tiles(const Decode& d) {
  return (d.group * d.q_len + S::kQueries - 1) / S::kQueries;
}

template <class S, typename T>
cudaError_t launch_decode(const Decode& d, cudaStream_t stream) {
  static std::atomic<uint64_t> allowed{0};
  static_assert(sizeof(Shared<S>) <= kBlockBytes);
  if (!S::kMerges && d.cluster > 1) return cudaErrorInvalidValue;
  const auto type = IsHalf<T>::value ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const Sequences cache{type, d.head_dim, d.kv_heads, d.pages, d.page, 1};
  const int box = std::min(S::kKeys, d.block_table ? d.page : S::kKeys);
  CacheMaps maps{};
  if (!encoder() || !encode(&maps.tiles[0], d.k, cache, false, box) || !encode(&maps.tiles[1], d.v, cache, false, box)) return cudaErrorInvalidValue;
  maps.boxed = 16 % d.group == 0;
  if (maps.boxed && (!encode_rows(&maps.q, d.q, d, type, S::kQueries) || !encode_rows(&maps.out, d.out, d, type, 16))) return cudaErrorInvalidValue;
  const auto kernel = decode<S, T>;
  if (const cudaError_t error = allow(kernel, sizeof(Shared<S>), allowed)) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(d.splits * S::kMates, row_tiles<S>(d) / S::kMates * d.kv_heads, d.batch);
  config.blockDim = dim3(S::kThreads), config.dynamicSmemBytes = sizeof(Shared<S>), config.stream = stream;
  cudaLaunchAttribute cluster[1];
  cluster[0].id = cudaLaunchAttributeClusterDimension;
  cluster[0].val.clusterDim = {unsigned(d.cluster * S::kMates), 1, 1};
  if (d.cluster * S::kMates > 1) config.attrs = cluster, config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, maps, d);
  return error != cudaSuccess || d.splits == d.cluster ? error : decoding::launch_join<T>(d, stream);
}

// Two tiles of rows that are all there are of a KV head bring keys to each other, but where keys are few: that makes blocks wait for each
// other before the first ones (60 nodes of 16 requests without a prefix take 21.4 us so, and 20.4 alone).
template <class S>
bool has_mates(const Decode& d) {
  return row_tiles<S>(d) == 2 && visited_keys(d) >= 2048;
}

// A stage less where words need its memory.
template <typename T>
int launch_decode(const Decode& d, DecodeKernel kernel, cudaStream_t stream) {
  if (d.head_dim > 128) return cudaErrorInvalidValue;
  if (kernel == DecodeKernel::kWarpgroup) {
    using Small = CacheShape<64, 128, 64, 3, 80>;
    static_assert(sizeof(Shared<Small>) <= kHalfBytes && sizeof(Shared<CacheShape<64, 64, 64, 5, 1088>>) <= kHalfBytes);
    if (d.head_dim <= 64) return launch_decode<CacheShape<64, 64, 64, 5, 1088>, T>(d, stream);
    return has_room<Small>(d) ? launch_decode<Small, T>(d, stream) : launch_decode<CacheShape<64, 128, 64, 4, 1088>, T>(d, stream);
  }
  using Long = CacheShape<128, 128, 128, 3, 320>;
  if (d.head_dim <= 64) return launch_decode<CacheShape<128, 64, 128, 4, 2176>, T>(d, stream);
  if (has_room<Long>(d) && has_mates<Long>(d)) return launch_decode<CacheShape<128, 128, 128, 3, 320, 2>, T>(d, stream);
  return has_room<Long>(d) ? launch_decode<Long, T>(d, stream) : launch_decode<CacheShape<128, 128, 128, 2, 2176>, T>(d, stream);
}

}  // namespace
}  // namespace sparse_attention::sm90
