// The gather engine: one row at a time against the scattered rows that its table lists.
//
//   forward  row = query:  s = dots(q, K);  p = exp(s - max);                 out = combine(p, V) / sum(p)
//   dq       row = query:  p = exp(dots(q, K) - lse);  dp = dots(dout, V);    dq = scale * combine(p * (dp - delta), K)
//   dk, dv   row = key:    p = exp(dots(k, Q) - lse);  dp = dots(v, dOut);    dk = scale * combine(p * (dp - delta), Q)
//                                                                             dv = combine(p, dOut)
// Every row is written by one thread, in the table's order: results do not depend on the number of threads.
#pragma once
#include <algorithm>
#include <cmath>

#include "../params.h"
#include "gather_rows.h"

namespace sparse_attention {
namespace gather {

constexpr int kBlock = 64;           // listed rows per step: their scores and addresses stay in L1
constexpr int kChunk = 256;          // rows per unit of work: neighbouring rows of a head share keys in cache
constexpr int kUnits = 32;           // units of work to aim at when there are few rows
constexpr int64_t kWorthThreads = 2048;  // pairs: waking a thread costs about 5 us, the time of some hundred pairs
constexpr double kLog2e = 1.4426950408889634;

struct RowRange {
  const int32_t* columns;
  int64_t count;
};

inline RowRange range_of(const RowsParams& table, int head, int rows, int r) {
  const int64_t index = int64_t(table.head_variant[head]) * rows + r;
  const int64_t start = table.row_start[index];
  return {table.columns + start, table.row_start[index + 1] - start};
}

inline int64_t count_pairs(const RowsParams& table, int batch, int heads, int rows) {
  int64_t pairs = 0;
  for (int head = 0; head < heads; ++head) {
    const int64_t first = int64_t(table.head_variant[head]) * rows;
    pairs += table.row_start[first + rows] - table.row_start[first];
  }
  return pairs * batch;
}

// Calls row(batch, head, r) for every row of every head.
template <class F>
inline void for_each_row(int batch, int heads, int rows, int64_t pairs, F row) {
  const int chunk = int(std::clamp<int64_t>(int64_t(batch) * heads * rows / kUnits, 8, kChunk));
  const int chunks = (rows + chunk - 1) / chunk;
  const int64_t units = int64_t(batch) * heads * chunks;
#pragma omp parallel for schedule(dynamic) if (pairs >= kWorthThreads)
  for (int64_t unit = 0; unit < units; ++unit) {
    const int first = int(unit % chunks) * chunk;
    const int head = int(unit / chunks % heads);
    const int b = int(unit / chunks / heads);
    for (int r = first; r < std::min(first + chunk, rows); ++r) row(b, head, r);
  }
}

// The part of a listed row that one step works on.
template <class T>
struct Step {
  using A = Acc<T>;
  int n;
  alignas(kVectorBytes) A score[kBlock];
  alignas(kVectorBytes) A grad[kBlock];  // dp, then p * (dp - delta)
  const T* near[kBlock];                 // the rows that give the score: K, or Q for dk and dv
  const T* far[kBlock];                  // V, or dOut

  void address(const RowRange& range, int64_t start, const T* a, int64_t a_stride, const T* b, int64_t b_stride) {
    n = int(std::min<int64_t>(kBlock, range.count - start));
    for (int r = 0; r < n; ++r) {
      const int64_t column = range.columns[start + r];
      near[r] = a + column * a_stride;
      far[r] = b + column * b_stride;
    }
    for (int r = n; r % kTogether; ++r) near[r] = near[r - 1], far[r] = far[r - 1];
  }
  // score[r] = scale * x . near[r], padded to whole vectors with -inf
  template <class Dim>
  void multiply_near(const A* x, Dim dim, A scale) {
    constexpr int L = Simd<A>::lanes;
    dots(x, near, n, dim, score);
    for (int r = 0; r < n; r += L) store(score + r, load(score + r) * scale);
    for (int r = n; r < padded<A>(n); ++r) score[r] = -kInfinity<A>;
  }
  // score = e^(score - top); returns the sum.
  A exponentiate(A top) {
    constexpr int L = Simd<A>::lanes;
    Vec<A> sum = {};
    for (int r = 0; r < n; r += L) {
      const Vec<A> p = exp2_nonpositive<A>((load(score + r) - top) * A(kLog2e));
      store(score + r, p);
      sum += p;
    }
    return reduce<A>(sum, add);
  }
  // The largest score, NaNs aside.
  A max_score() const {
    constexpr int L = Simd<A>::lanes;
    Vec<A> most = load(score);
    for (int r = L; r < n; r += L) most = larger(load(score + r), most);
    return reduce<A>(larger(most, splat(-kInfinity<A>)), larger);
  }
};

// A query that no key reached: lse -inf. Its probabilities are e^(s - inf) = 0.
template <class A>
inline A usable_lse(A lse) {
  return lse == -kInfinity<A> ? kInfinity<A> : lse;
}

template <class T, class Dim>
inline void forward_row(const ForwardParams& p, const RowsParams& table, Dim dim, int b, int h, int r) {
  using A = Acc<T>;
  alignas(kVectorBytes) A q[kMaxDim], total[kMaxDim];
  Step<T> step;
  const int kv_head = h / (p.heads / p.kv_heads);
  const T* keys = row_of<T>(p.k, b, kv_head, 0);
  const T* values = row_of<T>(p.v, b, kv_head, 0);
  read_row(row_of<T>(p.q, b, h, r), dim, A(1), q);
  if (r + 1 < p.q_len) prefetch_row(row_of<T>(p.q, b, h, r + 1), dim);
  clear_row(dim, total);
  A top = -kInfinity<A>, sum = 0;
  const RowRange range = range_of(table, h, p.q_len, r);
  for (int64_t start = 0; start < range.count; start += kBlock) {
    step.address(range, start, keys, p.k.row, values, p.v.row);
    step.multiply_near(q, dim, A(p.scale));
    const A new_top = std::max(top, step.max_score());
    const A decay = top == -kInfinity<A> ? A(0) : std::exp(top - new_top);
    sum = sum * decay + step.exponentiate(new_top == -kInfinity<A> ? A(0) : new_top);
    combine(step.score, step.far, step.n, dim, decay, total);
    top = new_top;
  }
  const A inverse = sum == A(0) ? A(0) : A(1) / sum;
  scale_row(inverse, dim, total);
  narrow(total, row_of<T>(p.out, b, h, r), dim);
  A* lse = static_cast<A*>(p.lse) + (int64_t(b) * p.heads + h) * p.q_len + r;
  *lse = sum == A(0) ? -kInfinity<A> : top + std::log(sum);
}

template <class T, class Dim>
inline void query_gradient_row(const BackwardParams& p, const RowsParams& table, Dim dim, int b, int h, int r) {
  using A = Acc<T>;
  alignas(kVectorBytes) A q[kMaxDim], dout[kMaxDim], total[kMaxDim];
  Step<T> step;
  const int kv_head = h / (p.heads / p.kv_heads);
  const T* keys = row_of<T>(p.k, b, kv_head, 0);
  const T* values = row_of<T>(p.v, b, kv_head, 0);
  const int64_t index = (int64_t(b) * p.heads + h) * p.q_len + r;
  const A lse = usable_lse(static_cast<const A*>(p.lse)[index]);
  const A delta = static_cast<const A*>(p.delta)[index];
  read_row(row_of<T>(p.q, b, h, r), dim, A(1), q);
  read_row(row_of<T>(p.dout, b, h, r), dim, A(1), dout);
  clear_row(dim, total);
  const RowRange range = range_of(table, h, p.q_len, r);
  for (int64_t start = 0; start < range.count; start += kBlock) {
    step.address(range, start, keys, p.k.row, values, p.v.row);
    step.multiply_near(q, dim, A(p.scale));
    dots(dout, step.far, step.n, dim, step.grad);
    step.exponentiate(lse);
    for (int n = 0; n < step.n; ++n) step.grad[n] = step.score[n] * (step.grad[n] - delta);
    combine(step.grad, step.near, step.n, dim, A(1), total);
  }
  A* dq = row_of<A>(p.dq, b, h, r);
  for (int d = 0; d < dim; ++d) dq[d] += A(p.scale) * total[d];
}

template <class T, class Dim>
inline void key_gradient_row(const BackwardParams& p, const RowsParams& table, Dim dim, int b, int kv_head, int t) {
  using A = Acc<T>;
  alignas(kVectorBytes) A k[kMaxDim], v[kMaxDim], total_k[kMaxDim], total_v[kMaxDim];
  Step<T> step;
  const int group = p.heads / p.kv_heads;
  read_row(row_of<T>(p.k, b, kv_head, t), dim, A(1), k);
  read_row(row_of<T>(p.v, b, kv_head, t), dim, A(1), v);
  clear_row(dim, total_k);
  clear_row(dim, total_v);
  for (int h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    const T* queries = row_of<T>(p.q, b, h, 0);
    const T* douts = row_of<T>(p.dout, b, h, 0);
    const A* lse = static_cast<const A*>(p.lse) + (int64_t(b) * p.heads + h) * p.q_len;
    const A* delta = static_cast<const A*>(p.delta) + (int64_t(b) * p.heads + h) * p.q_len;
    const RowRange range = range_of(table, h, p.kv_len, t);
    for (int64_t start = 0; start < range.count; start += kBlock) {
      step.address(range, start, queries, p.q.row, douts, p.dout.row);
      step.multiply_near(k, dim, A(p.scale));
      dots(v, step.far, step.n, dim, step.grad);
      const int32_t* listed = range.columns + start;
      for (int n = 0; n < step.n; ++n) step.score[n] -= usable_lse(lse[listed[n]]);
      step.exponentiate(A(0));
      for (int n = 0; n < step.n; ++n) step.grad[n] = step.score[n] * (step.grad[n] - delta[listed[n]]);
      combine(step.score, step.far, step.n, dim, A(1), total_v);
      combine(step.grad, step.near, step.n, dim, A(1), total_k);
    }
  }
  A* dk = row_of<A>(p.dk, b, kv_head, t);
  A* dv = row_of<A>(p.dv, b, kv_head, t);
  for (int d = 0; d < dim; ++d) dk[d] += A(p.scale) * total_k[d];
  for (int d = 0; d < dim; ++d) dv[d] += total_v[d];
}

}  // namespace gather

template <class T>
void gather_forward(const ForwardParams& p, const RowsParams& rows) {
  using namespace gather;
  const int64_t pairs = count_pairs(rows, p.batch, p.heads, p.q_len);
  with_dim(p.head_dim, [&](auto dim) {
    for_each_row(p.batch, p.heads, p.q_len, pairs, [&](int b, int h, int r) { forward_row<T>(p, rows, dim, b, h, r); });
  });
}

template <class T>
void gather_backward(const BackwardParams& p, const RowsParams& by_query, const RowsParams& by_key) {
  using namespace gather;
  const int64_t pairs = count_pairs(by_query, p.batch, p.heads, p.q_len);
  with_dim(p.head_dim, [&](auto dim) {
    for_each_row(p.batch, p.heads, p.q_len, pairs,
                 [&](int b, int h, int r) { query_gradient_row<T>(p, by_query, dim, b, h, r); });
    for_each_row(p.batch, p.kv_heads, p.kv_len, pairs,
                 [&](int b, int h, int t) { key_gradient_row<T>(p, by_key, dim, b, h, t); });
  });
}

}  // namespace sparse_attention
