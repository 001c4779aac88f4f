// Backward pass of the tile engine, in two sweeps that recompute the weights (Dao 2023): one over query tiles for dq, one over
// key tiles (the transposed layout) for dk and dv. Each output row is written by one thread in one order: no atomics, no scratch
// the size of the problem, and bit-equal results whatever the number of threads.
#pragma once
#include "tile_forward.h"

namespace sparse_attention {

template <class A>
struct BackwardScratch {
  explicit BackwardScratch(int dim) : arena(size_t(kTile) * (6 * dim + 2 * kTile + 2)) {
    for (A** x : {&a, &b, &total_a, &total_b, &row_a, &row_b}) *x = arena.take(dim * kTile);
    weight = arena.take(kTile * kTile);
    grad = arena.take(kTile * kTile);
    lse = arena.take(kTile);
    delta = arena.take(kTile);
  }
  Arena<A> arena;
  A *a, *b;              // the two packed lane-side operands
  A *total_a, *total_b;  // their gradients, packed
  A *row_a, *row_b;      // widened rows
  A *weight, *grad;      // [row][lane]: softmax weight, and gradient of the score
  A *lse, *delta;        // of the tile's queries; lse is +inf for a query that sees nothing
};

// lse[l] and delta[l] of `n` queries, padded to a tile.
template <class A>
inline void load_queries(const BackwardParams& p, int batch, int head, int first, int stride, int n, A* lse, A* delta) {
  const int64_t base = (int64_t(batch) * p.heads + head) * p.q_len + first;
  for (int l = 0; l < kTile; ++l) {
    const A x = l < n ? static_cast<const A*>(p.lse)[base + int64_t(l) * stride] : -kInfinity<A>;
    lse[l] = x == -kInfinity<A> ? kInfinity<A> : x;
    delta[l] = l < n ? static_cast<const A*>(p.delta)[base + int64_t(l) * stride] : A(0);
  }
}

// On entry weight holds dot products of q * factor and k, and grad those of dout and v; on return the softmax weights and the
// gradient of the scores. `lse_of(r)` and `delta_of(r)` are vectors over the lanes of group `group`.
template <class A, class LseOf, class DeltaOf>
inline void score_gradient(const Block<A>& block, int group, A natural, A* weight, A* grad, LseOf lse_of, DeltaOf delta_of) {
  constexpr int L = Simd<A>::lanes;
  using V = Vec<A>;
  const V none = splat<A>(-kInfinity<A>);
  for (int r = block.low[group]; r < block.high[group]; ++r) {
    A* w = weight + r * kTile + group * L;
    A* g = grad + r * kTile + group * L;
    V exponent = (load(w) * natural - lse_of(r)) * A(1.4426950408889634);
    if (block.masked) exponent = select_bits<A>(block.bits(r, group), exponent, none);
    const V weight_r = exp2_nonpositive<A>(exponent);
    V grad_r = weight_r * (load(g) - delta_of(r));
    if (block.masked) grad_r = select_bits<A>(block.bits(r, group), grad_r, V{});
    store(w, weight_r);
    store(g, grad_r);
  }
}

template <class A>
inline void accumulate_gradient(const Block<A>& block, const Rows<A>& rows, int groups, int dim, const A* weight, A* total) {
  accumulate_values<A>(block, rows, groups, dim, weight, nullptr, total);
}

template <class A>
inline void store_gradient(A* packed, A factor, int lanes, int dim, const Sequence<A>& out) {
  A block[8][8];
  for (int l0 = 0; l0 < lanes; l0 += 8)
    for (int d0 = 0; d0 < dim; d0 += 8) {
      for (int d = 0; d < 8; ++d) std::memcpy(block[d], packed + (d0 + d) * kTile + l0, sizeof(block[d]));
      transpose8(block);
      for (int l = 0; l < 8 && l0 + l < lanes; ++l) {
        A* row = out.data + (l0 + l) * out.stride + d0;
        for (int d = 0; d < 8; ++d) row[d] += block[l][d] * factor;
      }
    }
}

// dq of one query tile: lanes are queries, rows are keys.
template <class T>
void query_gradient(const BackwardParams& p, const LayoutParams& layout, const Item& item, BackwardScratch<Acc<T>>& s) {
  using A = Acc<T>;
  constexpr int L = Simd<A>::lanes;
  const ScoreScale<A> scale(p.scale);
  const View& view = *item.view;
  const int kv_head = item.head / (p.heads / p.kv_heads), dim = p.head_dim;
  const int lanes = std::min(kTile, view.q_count - item.tile * kTile), groups = ceil_div(lanes, L);
  const int q_first = view.q_first + item.tile * kTile * view.stride;

  const auto q = sequence<const T>(p.q, item.batch, item.head, q_first, view.stride);
  const auto dout = sequence<const T>(p.dout, item.batch, item.head, q_first, view.stride);
  const auto k = sequence<const T>(p.k, item.batch, kv_head, view.k_first, view.stride);
  const auto v = sequence<const T>(p.v, item.batch, kv_head, view.k_first, view.stride);
  const auto dq = sequence<A>(p.dq, item.batch, item.head, q_first, view.stride);
  pack(q.data, q.stride, lanes, dim, scale.factor, s.a);
  pack(dout.data, dout.stride, lanes, dim, A(1), s.b);
  load_queries(p, item.batch, item.head, q_first, view.stride, lanes, s.lse, s.delta);
  std::fill(s.total_a, s.total_a + dim * kTile, A(0));

  Block<A> block;
  for (int e = layout.row_start[view.row_base + item.tile]; e < layout.row_start[view.row_base + item.tile + 1]; ++e) {
    const Run run = layout.runs[e];
    const uint64_t* mask = run.mask < 0 ? nullptr : layout.masks_t + int64_t(run.mask) * kTile;
    for (int tile = run.first; tile < run.first + run.count; ++tile) {
      if (!block.select(tile, view.k_count, mask, groups)) continue;
      const Rows<A> keys = block_rows(k.data, k.stride, block, dim, s.row_a);
      dot_block_rows(block, keys, s.a, dim, groups, s.weight);
      dot_block_rows(block, block_rows(v.data, v.stride, block, dim, s.row_b), s.b, dim, groups, s.grad);
      for (int g = 0; g < groups; ++g)
        score_gradient(
            block, g, scale.natural, s.weight, s.grad, [&](int) { return load(s.lse + g * L); },
            [&](int) { return load(s.delta + g * L); });
      accumulate_gradient(block, keys, groups, dim, s.grad, s.total_a);
    }
  }
  store_gradient(s.total_a, A(p.scale), lanes, dim, dq);
}

// What one query head adds to dk and dv of one key tile: lanes are keys, rows are queries. In the transposed layout a run counts
// query tiles; `masks` still has a word of key columns for each query row.
template <class T>
void key_gradient(const BackwardParams& p, const LayoutParams& layout, const Item& item, BackwardScratch<Acc<T>>& s) {
  using A = Acc<T>;
  const ScoreScale<A> scale(p.scale);
  const View& view = *item.view;
  const int kv_head = item.head / (p.heads / p.kv_heads), dim = p.head_dim;
  const int lanes = std::min(kTile, view.k_count - item.tile * kTile), groups = ceil_div(lanes, Simd<A>::lanes);
  const int k_first = view.k_first + item.tile * kTile * view.stride;

  const auto k = sequence<const T>(p.k, item.batch, kv_head, k_first, view.stride);
  const auto v = sequence<const T>(p.v, item.batch, kv_head, k_first, view.stride);
  const auto q = sequence<const T>(p.q, item.batch, item.head, view.q_first, view.stride);
  const auto dout = sequence<const T>(p.dout, item.batch, item.head, view.q_first, view.stride);
  const auto dk = sequence<A>(p.dk, item.batch, kv_head, k_first, view.stride);
  const auto dv = sequence<A>(p.dv, item.batch, kv_head, k_first, view.stride);
  pack(k.data, k.stride, lanes, dim, scale.factor, s.a);
  pack(v.data, v.stride, lanes, dim, A(1), s.b);
  std::fill(s.total_a, s.total_a + dim * kTile, A(0));
  std::fill(s.total_b, s.total_b + dim * kTile, A(0));

  Block<A> block;
  for (int e = layout.row_start[view.row_base + item.tile]; e < layout.row_start[view.row_base + item.tile + 1]; ++e) {
    const Run run = layout.runs[e];
    const uint64_t* mask = run.mask < 0 ? nullptr : layout.masks + int64_t(run.mask) * kTile;
    for (int tile = run.first; tile < run.first + run.count; ++tile) {
      if (!block.select(tile, view.q_count, mask, groups)) continue;
      const int query = tile * kTile;
      load_queries(p, item.batch, item.head, view.q_first + query * view.stride, view.stride,
                   std::min(kTile, view.q_count - query), s.lse, s.delta);
      const Rows<A> queries = block_rows(q.data, q.stride, block, dim, s.row_a);
      const Rows<A> grads = block_rows(dout.data, dout.stride, block, dim, s.row_b);
      dot_block_rows(block, queries, s.a, dim, groups, s.weight);
      dot_block_rows(block, grads, s.b, dim, groups, s.grad);
      for (int g = 0; g < groups; ++g)
        score_gradient(
            block, g, scale.natural, s.weight, s.grad, [&](int r) { return splat<A>(s.lse[block.row(r) - query]); },
            [&](int r) { return splat<A>(s.delta[block.row(r) - query]); });
      accumulate_gradient(block, grads, groups, dim, s.weight, s.total_b);
      accumulate_gradient(block, queries, groups, dim, s.grad, s.total_a);
    }
  }
  store_gradient(s.total_a, A(p.scale), lanes, dim, dk);
  store_gradient(s.total_b, A(1), lanes, dim, dv);
}

template <class T>
void tile_backward(const BackwardParams& p, const LayoutParams& by_query, const LayoutParams& by_key) {
  using Scratch = BackwardScratch<Acc<T>>;
  const auto make_scratch = [&] { return Scratch(p.head_dim); };
  const int64_t madds = tile_madds(3, p.q_len, p.kv_len, p.head_dim);
  for_each_item<Scratch>(
      work_items(by_query, p.batch, p.heads, [](const View& view) { return view.q_count; }), madds, make_scratch,
      [&](const Item& item, Scratch& s) { query_gradient<T>(p, by_query, item, s); });
  // Query heads that share keys add to the same dk and dv, so they go one after the other.
  const int group = p.heads / p.kv_heads;
  const auto items = work_items(by_key, p.batch, p.heads, [](const View& view) { return view.k_count; });
  for (int member = 0; member < group; ++member) {
    std::vector<Item> of_member;
    for (const Item& item : items)
      if (item.head % group == member) of_member.push_back(item);
    for_each_item<Scratch>(of_member, madds, make_scratch,
                           [&](const Item& item, Scratch& s) { key_gradient<T>(p, by_key, item, s); });
  }
}

}  // namespace sparse_attention
