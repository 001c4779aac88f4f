// Forward pass of the tile engine: FlashAttention's online softmax (Dao et al. 2022, 2023) over the tiles a layout visits.
//
// Scores are kept transposed, keys by queries: the queries of a tile are the vector lanes, so maximum, sum and rescaling need no
// horizontal operation, and keys and values are read in place.
#pragma once
#include <cmath>

#include "walk.h"

namespace sparse_attention {

// How the score of a pair is made of the dot product of q * factor and k: dot * natural, or dot * log2 for powers of two. Scaling after
// the product keeps q, and so the products of two 16-bit numbers, exact; a scale that might overflow on the way goes into q.
template <class A>
struct ScoreScale {
  explicit ScoreScale(double scale) {
    const bool after = std::abs(scale) > 1e-9 && std::abs(scale) < 1e9;
    factor = after ? A(scale < 0 ? -1 : 1) : A(scale);
    natural = after ? A(std::abs(scale)) : A(1);
    log2 = A(double(natural) * 1.4426950408889634);
  }
  A factor, natural, log2;
};

template <class A>
struct ForwardScratch {
  explicit ForwardScratch(int dim) : arena(size_t(kTile) * (4 * dim + kTile + 3)) {
    q = arena.take(dim * kTile);
    total = arena.take(dim * kTile);
    score = arena.take(kTile * kTile);
    maximum = arena.take(kTile);
    sum = arena.take(kTile);
    decay = arena.take(kTile);
    k = arena.take(dim * kTile);
    v = arena.take(dim * kTile);
  }
  Arena<A> arena;
  A *q, *total, *score, *maximum, *sum, *decay, *k, *v;
};

// Turns the dot products of one group of lanes into weights, and moves its running maximum and sum.
template <class A>
inline void online_softmax(const Block<A>& block, int group, A log2, A* score, A* maximum, A* sum, A* decay) {
  constexpr int L = Simd<A>::lanes;
  using V = Vec<A>;
  const int low = block.low[group], high = block.high[group];
  const V none = splat<A>(-kInfinity<A>);
  A* column = score + group * L;
  const V before = load(maximum + group * L);
  V most = before;
  for (int r = low; r < high; ++r) {
    V s = load(column + r * kTile);
    if (block.masked) {
      s = select_bits<A>(block.bits(r, group), s, none);
      store(column + r * kTile, s);
    }
    most = s > most ? s : most;
  }
  const V origin = most == none ? V{} : most;  // a lane that has seen no key yet
  const V factor = exp2_nonpositive<A>((before - origin) * log2);
  V total = {};
  for (int first = low; first < high; first += 8) {  // in pieces, which round less than one long sum
    V part = {};
    for (int r = first; r < std::min(first + 8, high); ++r) {
      const V weight = exp2_nonpositive<A>((load(column + r * kTile) - origin) * log2);
      store(column + r * kTile, weight);
      part += weight;
    }
    total += part;
  }
  store(maximum + group * L, most);
  store(sum + group * L, load(sum + group * L) * factor + total);
  store(decay + group * L, factor);
}

// total[d][lane] = total * decay + sum over the block's values of weight * value.
template <class A>
inline void accumulate_values(const Block<A>& block, const Rows<A>& v, int groups, int dim, const A* score, const A* decay,
                              A* total) {
  if (!block.masked) return accumulate(v.data, v.stride, 0, block.n, score, dim, 0, groups, decay, total);
  for (int g = 0; g < groups; ++g)
    if (block.low[g] < block.high[g])
      accumulate(v.data, v.stride, block.low[g], block.high[g], score, dim, g, 1, decay, total);
}

// Scores of the block's rows against the lanes that need them.
template <class A>
inline void dot_block_rows(const Block<A>& block, const Rows<A>& rows, const A* packed, int dim, int groups, A* score) {
  if (!block.masked) return dot(rows.data, rows.stride, block.n, packed, dim, 0, groups, score);
  for (int r = 0; r < block.n; r += kDotRows) {
    const int n = std::min(kDotRows, block.n - r);
    int first = groups, last = -1;
    for (int g = 0; g < groups; ++g)
      if (block.low[g] < r + n && block.high[g] > r) first = std::min(first, g), last = g;
    dot(rows.data + r * rows.stride, rows.stride, n, packed, dim, first, last + 1 - first, score + r * kTile);
  }
}

template <class T>
void forward_item(const ForwardParams& p, const LayoutParams& layout, const Item& item, ForwardScratch<Acc<T>>& s) {
  using A = Acc<T>;
  const ScoreScale<A> scale(p.scale);
  const View& view = *item.view;
  const int kv_head = item.head / (p.heads / p.kv_heads), dim = p.head_dim;
  const int query = item.tile * kTile, lanes = std::min(kTile, view.q_count - query);
  const int groups = ceil_div(lanes, Simd<A>::lanes);
  const int q_first = view.q_first + query * view.stride;

  const auto q = sequence<const T>(p.q, item.batch, item.head, q_first, view.stride);
  const auto k = sequence<const T>(p.k, item.batch, kv_head, view.k_first, view.stride);
  const auto v = sequence<const T>(p.v, item.batch, kv_head, view.k_first, view.stride);
  const auto out = sequence<T>(p.out, item.batch, item.head, q_first, view.stride);
  const auto out_acc = sequence<A>(p.out, item.batch, item.head, q_first, view.stride);
  A* lse = static_cast<A*>(p.lse) + (int64_t(item.batch) * p.heads + item.head) * p.q_len + q_first;

  pack(q.data, q.stride, lanes, dim, scale.factor, s.q);
  if (p.accumulate) {  // go on from where the earlier parts stopped
    pack(out_acc.data, out_acc.stride, lanes, dim, A(1), s.total);
    for (int l = 0; l < kTile; ++l) {
      s.maximum[l] = l < lanes ? lse[int64_t(l) * view.stride] / scale.natural : -kInfinity<A>;
      s.sum[l] = s.maximum[l] == -kInfinity<A> ? A(0) : A(1);
    }
  } else {
    std::fill(s.total, s.total + dim * kTile, A(0));
    std::fill(s.maximum, s.maximum + kTile, -kInfinity<A>);
    std::fill(s.sum, s.sum + kTile, A(0));
  }

  Block<A> block;
  for (int e = layout.row_start[view.row_base + item.tile]; e < layout.row_start[view.row_base + item.tile + 1]; ++e) {
    const Run run = layout.runs[e];
    const uint64_t* mask = run.mask < 0 ? nullptr : layout.masks_t + int64_t(run.mask) * kTile;
    for (int tile = run.first; tile < run.first + run.count; ++tile) {
      if (!block.select(tile, view.k_count, mask, groups)) continue;
      dot_block_rows(block, block_rows(k.data, k.stride, block, dim, s.k), s.q, dim, groups, s.score);
      for (int g = 0; g < groups; ++g)
        if (block.low[g] < block.high[g]) online_softmax(block, g, scale.log2, s.score, s.maximum, s.sum, s.decay);
      accumulate_values(block, block_rows(v.data, v.stride, block, dim, s.v), groups, dim, s.score, s.decay, s.total);
    }
  }

  for (int l = 0; l < lanes; ++l)
    lse[int64_t(l) * view.stride] = s.sum[l] == 0 ? -kInfinity<A> : s.maximum[l] * scale.natural + std::log(s.sum[l]);
  for (int l = 0; l < kTile; ++l) s.decay[l] = s.sum[l] == 0 ? A(0) : A(1) / s.sum[l];
  if (p.out_accumulator)
    unpack(s.total, s.decay, lanes, dim, out_acc.data, out_acc.stride);
  else
    unpack(s.total, s.decay, lanes, dim, out.data, out.stride);
}

template <class T>
void tile_forward(const ForwardParams& p, const LayoutParams& layout) {
  using Scratch = ForwardScratch<Acc<T>>;
  const auto items = work_items(layout, p.batch, p.heads, [](const View& view) { return view.q_count; });
  for_each_item<Scratch>(
      items, tile_madds(2, p.q_len, p.kv_len, p.head_dim), [&] { return Scratch(p.head_dim); },
      [&](const Item& item, Scratch& scratch) { forward_item<T>(p, layout, item, scratch); });
}

}  // namespace sparse_attention
