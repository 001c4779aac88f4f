// What the libraries of both tiers' decoding share: the arguments, and the second launch.
#pragma once
#include "decode/join.cuh"

namespace sparse_attention {

inline Decode decode_of(void** pointers, const int64_t* strides, const int32_t* sizes, float scale) {
  Decode d{};
  Strided* tensors[4] = {&d.q, &d.out, &d.k, &d.v};
  for (int i = 0; i < 4; ++i) *tensors[i] = {pointers[i], strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]};
  d.lse = static_cast<float*>(pointers[4]), d.part_out = static_cast<float*>(pointers[5]), d.part_lse = static_cast<float*>(pointers[6]);
  d.lengths = static_cast<const int64_t*>(pointers[7]), d.ancestors = static_cast<const uint64_t*>(pointers[8]);
  d.block_table = static_cast<const int32_t*>(pointers[9]);
  int32_t* fields[] = {&d.batch, &d.heads, &d.kv_heads, &d.q_len, &d.head_dim, &d.capacity, &d.page, &d.pages, &d.table_width,
                       &d.ancestor_batch, &d.words, &d.window, &d.sinks, &d.splits, &d.cluster};
  for (int i = 0; i < 15; ++i) *fields[i] = sizes[i];
  d.length = sizes[15];
  d.scale = scale;
  d.group = d.heads / d.kv_heads;
  d.group_inverse = ((uint64_t{1} << 32) + d.group - 1) / d.group;
  d.kv_inverse = ((uint64_t{1} << 32) + d.kv_heads - 1) / d.kv_heads;
  return d;
}

template <typename T>
void join_all(const Decode& d, int seed) {
  const int rows = d.group * d.q_len;
  std::mt19937 random(seed);
  for (uint32_t x = 0; x < uint32_t(rows * d.head_dim / 4 + 127) / 128; ++x)
    for (uint32_t y = 0; y < uint32_t(d.kv_heads); ++y)
      for (uint32_t z = 0; z < uint32_t(d.batch); ++z) {
        blockIdx = {x, y, z};
        host::run_block(128, random, [&] { d.splits / d.cluster <= 8 ? decoding::join<T, 8>(d) : decoding::join<T, 16>(d); });
      }
}

}  // namespace sparse_attention
