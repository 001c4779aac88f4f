// The row-wise way of the decode engine, for tiles of few queries: each key row is fetched once and met by every query in turn.
#pragma once
#include "decode_tile.h"
#include "gather.h"

namespace sparse_attention::decoding {

template <class A>
struct RowsScratch {
  explicit RowsScratch(int) : arena(size_t(3 * gather::kMaxDim + 2) * kLanes) {
    q = arena.take(size_t(kLanes) * gather::kMaxDim);
    total = arena.take(size_t(kLanes) * gather::kMaxDim);
    maximum = arena.take(kLanes);
    sum = arena.take(kLanes);
  }
  Arena<A> arena;
  A *q, *total, *maximum, *sum;  // rows of kMaxDim
};

// Blocks [from, to) of a tile.
template <class T, class Dim>
inline Partial<Acc<T>> rows_item(const DecodeParams& p, const Tile& tile, int from, int to, Dim dim, RowsScratch<Acc<T>>& s) {
  using A = Acc<T>;
  using gather::kMaxDim;
  const Cache<T> keys(p, p.k, tile.b, tile.kv_head), values(p, p.v, tile.b, tile.kv_head);
  for (int l = 0; l < tile.count; ++l) {
    gather::read_row(tile.row<const T>(p, p.q, l), dim, A(1), s.q + l * kMaxDim);
    gather::clear_row(dim, s.total + l * kMaxDim);
    s.maximum[l] = -kInfinity<A>;
    s.sum[l] = 0;
  }
  Block block;
  gather::Step<T> step;
  for (int x = from; x < to; ++x) {
    if (!block.select(p, tile, x)) continue;
    step.n = block.n;
    for (int r = 0; r < block.n; ++r) step.near[r] = keys.row(block.at(r)), step.far[r] = values.row(block.at(r));
    for (int r = block.n; r % gather::kTogether; ++r) step.near[r] = step.near[r - 1], step.far[r] = step.far[r - 1];
    for (int l = 0; l < tile.count; ++l) {
      if (block.masked && !block.seen[l]) continue;
      step.multiply_near(s.q + l * kMaxDim, dim, A(p.scale));
      if (block.masked)
        for (int r = 0; r < block.n; ++r)
          if (!(block.seen[l] >> block.key[r] & 1)) step.score[r] = -kInfinity<A>;
      const A top = std::max(s.maximum[l], step.max_score());
      const A decay = s.maximum[l] == -kInfinity<A> ? A(0) : std::exp(s.maximum[l] - top);
      s.sum[l] = s.sum[l] * decay + step.exponentiate(top == -kInfinity<A> ? A(0) : top);
      gather::combine(step.score, step.far, step.n, dim, decay, s.total + l * kMaxDim);
      s.maximum[l] = top;
    }
  }
  for (int l = 1; l < tile.count; ++l) std::copy_n(s.total + l * kMaxDim, int(dim), s.total + l * int(dim));
  return {s.total, s.maximum, s.sum};
}

}  // namespace sparse_attention::decoding
