// The two register-blocked products that every pass of the tile engine is made of.
//
// A tile has `rows` on one side and kTile lanes on the other. Lanes are packed (transposed, padded with zeros); rows stay in the
// caller's tensor and are broadcast element by element, so neither keys nor values are ever copied or transposed:
//   dot:         score[r][lane]  = sum_d row_r[d] * packed[d][lane]
//   accumulate:  total[d][lane] += sum_r row_r[d] * weight[r][lane]
#pragma once
#include <algorithm>

#include "simd.h"

namespace sparse_attention {

constexpr int kTile = 64;

template <class A>
constexpr int kGroups = kTile / Simd<A>::lanes;

// A block of kDotRows rows by kWide vectors of lanes lives in registers: 16 of 32 with AVX-512, 12 of 16 below. Measured on Zen 4,
// window 1024: 4 x 4 against 6 x 4 is 1.02x; with AVX2, 4 x 3 against 6 x 2 is 1.04x and against 4 x 2 is 1.2x.
#if defined(__AVX512F__)
constexpr int kWide = 4, kDotRows = 4;
#else
constexpr int kWide = 3, kDotRows = 4;
#endif

// Elements of head_dim that are summed before the sum goes to memory: a longer chain of additions rounds worse than PyTorch's GEMM.
constexpr int kDotDepth = 64;

template <class A, int R, int V>
inline void dot_block(const A* rows, int64_t row_stride, const A* packed, int dim, A* score) {
  constexpr int L = Simd<A>::lanes;
  for (int begin = 0; begin < dim; begin += kDotDepth) {
    Vec<A> sum[R][V] = {};
    for (int d = begin; d < std::min(begin + kDotDepth, dim); ++d) {
      Vec<A> lane[V];
      for (int v = 0; v < V; ++v) lane[v] = load(packed + d * kTile + v * L);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec<A> x = splat(rows[r * row_stride + d]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sum[r][v] += x * lane[v];
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) {
        A* s = score + r * kTile + v * L;
        store(s, begin ? load(s) + sum[r][v] : sum[r][v]);
      }
  }
}

// `first` and `last` are the rows whose products are wanted; total is first multiplied by decay unless that is null. The products are
// summed on their own and then added: one sum over all tiles would lose up to sqrt(tiles) times as much to rounding.
template <class A, int R, int V>
inline void accumulate_block(const A* rows, int64_t row_stride, int first, int last, const A* weight, const A* decay,
                             A* total) {
  constexpr int L = Simd<A>::lanes;
  Vec<A> sum[R][V] = {};
  for (int j = first; j < last; ++j) {
    Vec<A> w[V];
    for (int v = 0; v < V; ++v) w[v] = load(weight + j * kTile + v * L);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<A> x = splat(rows[j * row_stride + r]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] += x * w[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      A* t = total + r * kTile + v * L;
      store(t, decay ? load(t) * load(decay + v * L) + sum[r][v] : load(t) + sum[r][v]);
    }
}

template <class A, int R>
inline void dot_rows(const A* rows, int64_t row_stride, const A* packed, int dim, int group, int groups, A* score) {
  constexpr int L = Simd<A>::lanes;
  for (int g = group; g < group + groups; g += kWide) {
    const A* p = packed + g * L;
    A* s = score + g * L;
    switch (std::min(kWide, group + groups - g)) {
      case 1: dot_block<A, R, 1>(rows, row_stride, p, dim, s); break;
      case 2: dot_block<A, R, 2>(rows, row_stride, p, dim, s); break;
      case 3: dot_block<A, R, 3>(rows, row_stride, p, dim, s); break;
      default: dot_block<A, R, kWide>(rows, row_stride, p, dim, s);
    }
  }
}

// Scores of `n` rows against the lane groups [group, group + groups).
template <class A>
inline void dot(const A* rows, int64_t row_stride, int n, const A* packed, int dim, int group, int groups, A* score) {
  int r = 0;
  for (; r + kDotRows <= n; r += kDotRows)
    dot_rows<A, kDotRows>(rows + r * row_stride, row_stride, packed, dim, group, groups, score + r * kTile);
  for (; r < n; ++r) dot_rows<A, 1>(rows + r * row_stride, row_stride, packed, dim, group, groups, score + r * kTile);
}

// Adds rows [first, last) into the lane groups [group, group + groups) of total.
template <class A>
inline void accumulate(const A* rows, int64_t row_stride, int first, int last, const A* weight, int dim, int group,
                       int groups, const A* decay, A* total) {
  constexpr int L = Simd<A>::lanes;
  int g = group;
  for (; g + kWide <= group + groups; g += kWide)
    for (int d = 0; d < dim; d += 4)
      accumulate_block<A, 4, kWide>(rows + d, row_stride, first, last, weight + g * L, decay ? decay + g * L : nullptr,
                                    total + d * kTile + g * L);
  for (; g < group + groups; ++g)
    for (int d = 0; d < dim; d += 8)
      accumulate_block<A, 8, 1>(rows + d, row_stride, first, last, weight + g * L, decay ? decay + g * L : nullptr,
                                total + d * kTile + g * L);
}

}  // namespace sparse_attention
