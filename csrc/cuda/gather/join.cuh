// The rows that were cut into pieces, from what the pieces left in memory.
#pragma once
#include "gather.cuh"

namespace sparse_attention::gather {
namespace {

// One warp joins 32 elements of the pieces of one row of one head, 32 pieces at a time.
template <typename T>
__global__ void __launch_bounds__(32 * kWarps, 8) join_pieces(const __grid_constant__ Forward f) {
  using A = typename Accumulator<T>::Type;
  const int lane = threadIdx.x % 32, parts = (f.head_dim + 31) / 32;
  int number = blockIdx.x * kWarps + threadIdx.x / 32;
  const int element = number % parts * 32 + lane;
  const int h = (number /= parts) % f.together;
  const int n = (number /= f.together) % f.n_splits, batch = number / f.n_splits;
  if (batch >= f.batch) return;
  const Split split = f.splits[n];
  const int64_t first = (int64_t(batch) * f.n_pieces + split.first_piece) * f.together + h;
  const A* totals = static_cast<const A*>(f.partial) + first * f.head_dim + element;
  const A* ends = static_cast<const A*>(f.partial) + int64_t(f.batch) * f.n_pieces * f.together * f.head_dim + 2 * first;
  const bool mine = element < f.head_dim;

  Softmax<A, 1, 1> whole;
  whole.clear();
  A& top = whole.top[0];
  for (int piece = lane; piece < split.pieces; piece += 32) top = larger(top, ends[2 * piece * f.together]);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) top = larger(top, __shfl_xor_sync(~0u, top, distance));

  for (int begin = 0; begin < split.pieces; begin += 32) {
    const int some = min(32, split.pieces - begin);
    A weight = 0, share = 0;
    if (lane < some) {
      const A* end = ends + 2 * (begin + lane) * f.together;
      weight = power_of_2(end[0] - usable(top)), share = end[1] * weight;
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) share += __shfl_xor_sync(~0u, share, distance);
    whole.sum[0] += share;
    A part = 0;
#pragma unroll 8
    for (int piece = 0; piece < some; ++piece) {
      const A factor = __shfl_sync(~0u, weight, piece);
      if (mine) part += factor * totals[int64_t(begin + piece) * f.together * f.head_dim];
    }
    whole.total[0][0] += part;
  }

  if (element == 0) static_cast<A*>(f.lse)[(int64_t(batch) * f.heads + split.head + h) * f.q_len + split.row] = whole.lse(0);
  if (mine) row_of<T>(f.out, batch, split.head + h, split.row)[element] = narrow(whole.total[0][0] * whole.inverse(0), T());
}

}  // namespace
}  // namespace sparse_attention::gather
