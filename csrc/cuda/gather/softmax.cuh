// The softmax of some keys, for several queries side by side: what it takes to go on with more keys, or to join with others.
#pragma once
#include "element.cuh"

namespace sparse_attention::gather {
namespace {

// A query without keys has top -inf. Exponents that refer to it must not become inf - inf.
template <typename A>
__device__ inline A usable(A top) {
  return top == -infinity<A>() ? A(0) : top;
}

// top: the largest score, in powers of 2. sum: of 2^(score - top). total: of 2^(score - top) * value, this lane's elements.
template <typename A, int kQueries, int kElements>
struct Softmax {
  A top[kQueries], sum[kQueries], total[kQueries][kElements];

  __device__ void clear() {
#pragma unroll
    for (int n = 0; n < kQueries; ++n) {
      top[n] = -infinity<A>(), sum[n] = 0;
#pragma unroll
      for (int e = 0; e < kElements; ++e) total[n][e] = 0;
    }
  }

  __device__ void join(const Softmax& other) {
#pragma unroll
    for (int n = 0; n < kQueries; ++n) {
      const A most = larger(top[n], other.top[n]);
      const A mine = power_of_2(top[n] - usable(most)), theirs = power_of_2(other.top[n] - usable(most));
      top[n] = most;
      sum[n] = sum[n] * mine + other.sum[n] * theirs;
#pragma unroll
      for (int e = 0; e < kElements; ++e) total[n][e] = total[n][e] * mine + other.total[n][e] * theirs;
    }
  }

  // Joins with the lane `distance` away.
  __device__ void join_lane(int distance) {
    Softmax other;
#pragma unroll
    for (int n = 0; n < kQueries; ++n) {
      other.top[n] = __shfl_xor_sync(~0u, top[n], distance), other.sum[n] = __shfl_xor_sync(~0u, sum[n], distance);
#pragma unroll
      for (int e = 0; e < kElements; ++e) other.total[n][e] = __shfl_xor_sync(~0u, total[n][e], distance);
    }
    join(other);
  }

  __device__ A inverse(int n) const { return sum[n] == A(0) ? A(0) : reciprocal(sum[n]); }
  __device__ A lse(int n) const { return sum[n] == A(0) ? -infinity<A>() : top[n] * A(kLn2) + logarithm(sum[n]); }
};

}  // namespace
}  // namespace sparse_attention::gather
