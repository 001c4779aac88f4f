// The second launch, where more blocks share the keys than a cluster holds: each cluster has left one part.
#pragma once
#include "merge.cuh"

namespace sparse_attention::decoding {

// A thread joins four columns of one row, of which it asks for kBatch parts at once. grid: (rows * head_dim / 4 / 128, kv_heads, batch), 128 threads
template <typename T, int kBatch>
__global__ void __launch_bounds__(128) join(const __grid_constant__ Decode d) {
  const int rows = d.group * d.q_len, n = blockIdx.x * 128 + threadIdx.x;
  const int row = n / (d.head_dim / 4), column = (n - row * (d.head_dim / 4)) * 4, kv_head = blockIdx.y, batch = blockIdx.z;
  if (row >= rows) return;
  const int64_t group = int64_t{batch} * d.kv_heads + kv_head, step = int64_t{d.batch} * d.kv_heads * rows, at = group * rows + row;
  wait_for_previous();
  Merged all;
  all.add<kBatch>(d.splits / d.cluster,
              [&](int split) {
                const float lse = d.part_lse[split * step + at];
                return float2{lse * 1.4426950408889634f, lse == -INFINITY ? 0.0f : 1.0f};
              },
              [&](int split) { return *reinterpret_cast<const float4*>(d.part_out + (split * step + at) * d.head_dim + column); });
  if (column == 0 && d.lse) d.lse[lse_of(d, batch, kv_head, row)] = all.lse();
  all.store(row_of<T>(d, d.out, batch, kv_head, row) + column);
}

}  // namespace sparse_attention::decoding
