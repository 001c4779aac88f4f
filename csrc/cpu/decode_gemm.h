// The two products of the decode engine, over a panel: two vectors of lanes (at least 8 lanes), each lane a query.
//
//   dot:         score[r][lane]  = sum_d row_r[d] * packed[d][lane]
//   accumulate:  total[d][lane] += sum_r row_r[d] * weight[r][lane]
//
// As in gemm.h rows are broadcast from where they lie. There a tile of 64 lanes is one array; here a panel is, so that the lanes of
// 128 dimensions (16 KB) stay in L1 with the rows of a register block, and many queries of a group pass over one block of keys.
#pragma once
#include "gemm.h"

namespace sparse_attention::decoding {

template <class A>
constexpr int kPanel = std::max(8, 2 * Simd<A>::lanes);

// Rows of a register block: 24 sums of 32 registers with AVX-512, 12 of 16 below. What is left over goes in blocks of a third, then one.
#if defined(__AVX512F__)
constexpr int kBlockRows = 12;
#else
constexpr int kBlockRows = 6;
#endif

template <class A, int R, int V>
inline void dot_rows_block(const A* rows, int64_t stride, const A* packed, int dim, A* score) {
  constexpr int L = Simd<A>::lanes;
  for (int begin = 0; begin < dim; begin += kDotDepth) {
    Vec<A> sum[R][V] = {};
    for (int d = begin; d < std::min(begin + kDotDepth, dim); ++d) {
      Vec<A> lane[V];
      for (int v = 0; v < V; ++v) lane[v] = load(packed + d * kPanel<A> + v * L);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const Vec<A> x = splat(rows[r * stride + d]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] += x * lane[v];
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) {
        A* s = score + r * kPanel<A> + v * L;
        store(s, begin ? load(s) + sum[r][v] : sum[r][v]);
      }
  }
}

template <class A, int R, int V>
inline void accumulate_block(const A* rows, int64_t stride, int first, int last, const A* weight, const A* decay, A* total) {
  constexpr int L = Simd<A>::lanes;
  Vec<A> sum[R][V] = {};
  for (int j = first; j < last; ++j) {
    Vec<A> w[V];
    for (int v = 0; v < V; ++v) w[v] = load(weight + j * kPanel<A> + v * L);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Vec<A> x = splat(rows[j * stride + r]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += x * w[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      A* t = total + r * kPanel<A> + v * L;
      store(t, load(t) * load(decay + v * L) + sum[r][v]);
    }
}

// Scores of `n` rows against a panel of V vectors.
template <class A, int V>
inline void dot(const A* rows, int64_t stride, int n, const A* packed, int dim, A* score) {
  int r = 0;
  for (; r + kBlockRows <= n; r += kBlockRows)
    dot_rows_block<A, kBlockRows, V>(rows + r * stride, stride, packed, dim, score + r * kPanel<A>);
  for (; r + kBlockRows / 3 <= n; r += kBlockRows / 3)
    dot_rows_block<A, kBlockRows / 3, V>(rows + r * stride, stride, packed, dim, score + r * kPanel<A>);
  for (; r < n; ++r) dot_rows_block<A, 1, V>(rows + r * stride, stride, packed, dim, score + r * kPanel<A>);
}

// total = total * decay, plus rows [first, last). A head_dim is a multiple of 8, so blocks of a third of kBlockRows reach its end.
template <class A, int V>
inline void accumulate(const A* rows, int64_t stride, int first, int last, const A* weight, int dim, const A* decay, A* total) {
  int d = 0;
  for (; d + kBlockRows <= dim; d += kBlockRows)
    accumulate_block<A, kBlockRows, V>(rows + d, stride, first, last, weight, decay, total + d * kPanel<A>);
  for (; d < dim; d += kBlockRows / 3)
    accumulate_block<A, kBlockRows / 3, V>(rows + d, stride, first, last, weight, decay, total + d * kPanel<A>);
}

}  // namespace sparse_attention::decoding
