// The decoding kernels of every tier as a function of a host library, for tests/test_cuda_decode_on_host.py, which knows the arguments.
#include "decode/kernel.cuh"
#include "join.h"

using namespace sparse_attention;
using namespace sparse_attention::decoding;

namespace {

template <class S>
void run_all(const Decode& d, int seed) {
  constexpr size_t kBytes = sizeof(Shared<S>);
  const std::unique_ptr<uint8_t, void (*)(void*)> memory(static_cast<uint8_t*>(std::aligned_alloc(128, kBytes * d.cluster)), std::free);
  sm80::shared_memory = memory.get(), shared_bytes = kBytes;
  std::mt19937 random(seed);
  const int rows = d.group * d.q_len, tiles = (rows + S::kRows - 1) / S::kRows;
  for (uint32_t split = 0; split < uint32_t(d.splits); split += d.cluster)
    for (uint32_t y = 0; y < uint32_t(d.kv_heads * tiles); ++y)
      for (uint32_t z = 0; z < uint32_t(d.batch); ++z) {
        blockIdx = {split, y, z};
        std::memset(sm80::shared_memory, 0xFF, kBytes * d.cluster);
        const auto body = [&] {
          auto& shared = *reinterpret_cast<Shared<S>*>(sm80::shared_memory + kBytes * (blockIdx.x - split));
          const int kv_head = y / tiles, first_row = (tiles - 1 - y % tiles) * S::kRows;
          copy_queries<S>(d, shared.queries(), z, kv_head, first_row);
          const uint32_t used = used_words(d, &shared.used, z, first_row, S::kRows, S::kThreads);
          Worker<S>(d, shared, length_of(d, z), used, kv_head, z, first_row, blockIdx.x).run(is_node(d, z, threadIdx.x));
        };
        host::run_block(S::kThreads, random, body, d.cluster);
      }
  if (d.splits > d.cluster) join_all<typename S::T>(d, seed);
}

template <typename T, int kDim>
void run_dim(const Decode& d, int kernel, int seed) {
  constexpr int kRowBytes = kDim * sizeof(T);
  if (kernel == 0 && reads_once(d, 16)) run_all<Shape<T, kDim, 1, kDim <= 128 ? 4 : 2, true>>(d, seed);
  else if (kernel == 0) run_all<Shape<T, kDim, 1, kDim <= 128 ? 4 : 2>>(d, seed);
  else if (kernel == 2 && kRowBytes <= 256 && sizeof(T) == 2) run_all<Shape<T, kDim, 4, 1>>(d, seed);
  else run_all<Shape<T, kDim, (kRowBytes > 512 ? 2 : 4), (kRowBytes <= 256 ? 2 : 1)>>(d, seed);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int decode(void** pointers, const int64_t* strides, const int32_t* sizes, float scale, int single, int kernel,
                                                             int seed) {
  const Decode d = decode_of(pointers, strides, sizes, scale);
  try {
    if (single) d.head_dim <= 64 ? run_dim<float, 64>(d, kernel, seed) : run_dim<float, 256>(d, kernel, seed);
    else if (d.head_dim <= 64) run_dim<__nv_bfloat16, 64>(d, kernel, seed);
    else if (d.head_dim <= 128) run_dim<__nv_bfloat16, 128>(d, kernel, seed);
    else run_dim<__nv_bfloat16, 256>(d, kernel, seed);
  } catch (const std::runtime_error&) {
    return 1;
  }
  return 0;
}
