// Host side of decoding on the sm90 tier. No torch.
#pragma once
#include "../decode/join_launch.cuh"
#include "decode.cuh"
#include "maps.cuh"

namespace sparse_attention::sm90 {
namespace {

template <class S, typename T>
cudaError_t launch_decode(const Decode& d, cudaStream_t stream) {
  static std::atomic<uint64_t> allowed{0};
  static_assert(sizeof(Span<S::kKeys>) + sizeof(uint32_t) <= sizeof(Shared<S>::out) && sizeof(Shared<S>) + 1024 <= 227 * 1024);
  const auto type = IsHalf<T>::value ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const Sequences cache{type, d.head_dim, d.kv_heads, d.pages, d.page, 1};
  const int box = std::min(S::kKeys, d.block_table ? d.page : S::kKeys);
  CacheMaps maps;
  if (!encoder() || !encode(&maps.k, d.k, cache, false, box) || !encode(&maps.v, d.v, cache, false, box)) return cudaErrorInvalidValue;
  const auto kernel = decode<S, T>;
  const int bytes = sizeof(Shared<S>) + 1024, rows = d.heads / d.kv_heads * d.q_len, tiles = (rows + S::kQueries - 1) / S::kQueries;
  const cudaError_t error = allow(kernel, bytes, allowed);
  if (error != cudaSuccess) return error;
  kernel<<<dim3(d.splits, d.kv_heads * tiles, d.batch), S::kThreads, bytes, stream>>>(maps, d, tiles);
  const cudaError_t launched = cudaGetLastError();
  return launched != cudaSuccess || d.splits == 1 ? launched : decoding::launch_join<T>(d, stream);
}

template <typename T>
int launch_decode(const Decode& d, cudaStream_t stream) {
  if (d.head_dim > 128) return cudaErrorInvalidValue;
  return d.head_dim <= 64 ? launch_decode<CacheShape<64, 128, 4>, T>(d, stream) : launch_decode<CacheShape<128, 128, 3>, T>(d, stream);
}

}  // namespace
}  // namespace sparse_attention::sm90
