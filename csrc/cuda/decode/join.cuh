// The second launch, where more blocks share the keys than a cluster holds.
#pragma once
#include "../decode.h"
#include "ptx.h"

namespace sparse_attention::decoding {

// A warp joins the splits of one row. grid: (rows / 4, kv_heads, batch), 4 warps
template <typename T>
__global__ void __launch_bounds__(128) join(const __grid_constant__ Decode d) {
  const int lane = threadIdx.x % 32, group = d.heads / d.kv_heads, rows = group * d.q_len;
  const int row = blockIdx.x * 4 + threadIdx.x / 32, kv_head = blockIdx.y, batch = blockIdx.z;
  if (row >= rows) return;
  const int64_t step = int64_t{d.batch} * d.kv_heads * rows, at = (int64_t{batch} * d.kv_heads + kv_head) * rows + row;
  wait_for_previous();
  float top = -INFINITY;
  for (int s = lane; s < d.splits; s += 32) top = fmaxf(top, d.part_lse[s * step + at]);
  for (int x = 16; x; x /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, x));
  const float base = top == -INFINITY ? 0 : top;
  float all = 0;
  float sum[4][2] = {};  // columns 64 i + 2 lane and the next
#pragma unroll 4
  for (int s = 0; s < d.splits; ++s) {
    const float weight = __expf(d.part_lse[s * step + at] - base);
    all += weight;
    const float* from = d.part_out + (s * step + at) * d.head_dim;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (const int column = 64 * i + 2 * lane; column < d.head_dim) {
        const float2 part = *reinterpret_cast<const float2*>(from + column);
        const float2 x = weight == 0 ? float2{0, 0} : part;  // what has no weight may not have been written
        sum[i][0] = fmaf(weight, x.x, sum[i][0]), sum[i][1] = fmaf(weight, x.y, sum[i][1]);
      }
  }
  const int64_t head = int64_t{kv_head} * group + row / d.q_len;
  if (lane == 0 && d.lse) d.lse[(int64_t{batch} * d.heads + head) * d.q_len + row % d.q_len] = all == 0 ? -INFINITY : top + __logf(all);
  const float keep = all == 0 ? 0 : 1 / all;
  T* to = static_cast<T*>(d.out.data) + batch * d.out.batch + head * d.out.head + row % d.q_len * d.out.row;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (const int column = 64 * i + 2 * lane; column < d.head_dim) {
      const float x = sum[i][0] * keep, y = sum[i][1] * keep;
      if constexpr (sizeof(T) == 4) *reinterpret_cast<float2*>(to + column) = float2{x, y};
      else *reinterpret_cast<uint32_t*>(to + column) = sm80::pack<T>(x, y);
    }
}

}  // namespace sparse_attention::decoding
