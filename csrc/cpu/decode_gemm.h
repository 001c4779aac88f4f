// The two products of the decode engine, over a panel: two vectors of lanes (at least 8 lanes), each lane a query.
//
//   dot:         score[r][lane]  = sum_d row_r[d] * packed[d][lane]
//   accumulate:  total[d][lane] += sum_r row_r[d] * weight[r][lane]
//
// As in gemm.h rows are broadcast from where they lie. There a tile of 64 lanes is one array; here a panel is, so that the lanes of
// 128 dimensions (16 KB) stay in L1 with the rows of a register block, and many queries of a group pass over one block of keys.
// `Op` says what an element is (WideOp, or PairOp in decode_pairs.h) and how many numbers it holds.
#pragma once
#include "gemm.h"

namespace sparse_attention::decoding {

template <class A>
constexpr int kPanel = std::max(8, 2 * Simd<A>::lanes);

// Rows of a register block: 24 sums of 32 registers with AVX-512, 12 of 16 below. What is left over goes in smaller ones.
#if defined(__AVX512F__)
constexpr int kBlockRows = 12;
#else
constexpr int kBlockRows = 6;
#endif

template <class A>
struct WideOp {
  using Sum = A;      // what is summed in
  using Row = A;      // what rows are made of
  using Element = A;  // what lanes are made of
  static constexpr int numbers = 1;
  static Vec<A> spread(const Row* x) { return splat(*x); }
  static Vec<A> lanes(const Element* x) { return load(x); }
  static Vec<A> add_product(Vec<A> sum, Vec<A> x, Vec<A> lane) { return sum + x * lane; }
};

// The rows of the next block of keys, asked for a few at a time between the register blocks of this one: all at once would wait for each
// other, and the first use of each would wait for memory.
struct Ahead {
  const char* rows[2 * 64];
  int count = 0, at = 0, together = 1, bytes = 0;

  void step() {
    for (const int stop = std::min(at + together, count); at < stop; ++at)
      for (int x = 0; x < bytes; x += 64) __builtin_prefetch(rows[at] + x, 0, 2);
  }
};

template <class Op, int R, int V>
inline void dot_rows_block(const typename Op::Row* rows, int64_t stride, const typename Op::Element* packed, int elements,
                           typename Op::Sum* score) {
  using A = typename Op::Sum;
  constexpr int L = Simd<A>::lanes;
  for (int begin = 0; begin < elements; begin += kDotDepth) {
    Vec<A> sum[R][V] = {};
    for (int d = begin; d < std::min(begin + kDotDepth, elements); ++d) {
      Vec<A> lane[V];
      for (int v = 0; v < V; ++v) lane[v] = Op::lanes(packed + d * kPanel<A> + v * L);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const Vec<A> x = Op::spread(rows + r * stride + d * Op::numbers);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] = Op::add_product(sum[r][v], x, lane[v]);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        A* s = score + r * kPanel<A> + v * L;
        store(s, begin ? load(s) + sum[r][v] : sum[r][v]);
      }
  }
}

template <class Op, int R, int V>
inline void accumulate_block(const typename Op::Row* rows, int64_t stride, int first, int last, const typename Op::Element* weight,
                             const typename Op::Sum* decay, typename Op::Sum* total) {
  using A = typename Op::Sum;
  constexpr int L = Simd<A>::lanes;
  Vec<A> sum[R][V] = {};
  for (int j = first; j < last; ++j) {
    Vec<A> w[V];
    for (int v = 0; v < V; ++v) w[v] = Op::lanes(weight + j * kPanel<A> + v * L);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Vec<A> x = Op::spread(rows + j * stride + r * Op::numbers);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = Op::add_product(sum[r][v], x, w[v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      A* t = total + r * kPanel<A> + v * L;
      store(t, load(t) * load(decay + v * L) + sum[r][v]);
    }
}

// Scores of `n` rows of `elements` elements against a panel of V vectors.
template <class Op, int V>
inline void dot(const typename Op::Row* rows, int64_t stride, int n, const typename Op::Element* packed, int elements,
                typename Op::Sum* score, Ahead& ahead) {
  constexpr int P = kPanel<typename Op::Sum>, R = kBlockRows;
  int r = 0;
  for (; r + R <= n; r += R, ahead.step()) dot_rows_block<Op, R, V>(rows + r * stride, stride, packed, elements, score + r * P);
  for (; r + 4 <= n; r += 4) dot_rows_block<Op, 4, V>(rows + r * stride, stride, packed, elements, score + r * P);
  for (; r + 2 <= n; r += 2) dot_rows_block<Op, 2, V>(rows + r * stride, stride, packed, elements, score + r * P);
  for (; r < n; ++r) dot_rows_block<Op, 1, V>(rows + r * stride, stride, packed, elements, score + r * P);
}

// total = total * decay, plus rows [first, last). head_dim is a multiple of 8, so blocks of a third of kBlockRows reach its end.
template <class Op, int V>
inline void accumulate(const typename Op::Row* rows, int64_t stride, int first, int last, const typename Op::Element* weight, int dim,
                       const typename Op::Sum* decay, typename Op::Sum* total, Ahead& ahead) {
  constexpr int P = kPanel<typename Op::Sum>, R = kBlockRows;
  int d = 0;
  for (; d + R <= dim; d += R, ahead.step())
    accumulate_block<Op, R, V>(rows + d * Op::numbers, stride, first, last, weight, decay, total + d * P);
  for (; d < dim; d += R / 3)
    accumulate_block<Op, R / 3, V>(rows + d * Op::numbers, stride, first, last, weight, decay, total + d * P);
}

}  // namespace sparse_attention::decoding
