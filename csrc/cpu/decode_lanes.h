// The lanes way of the decode engine, for tiles of many queries: scores are keys by queries and queries are vector lanes, as in the tile
// engine, in panels (decode_gemm.h). A block of keys is read once for all panels.
#pragma once
#include <cmath>

#include "decode_gemm.h"
#include "decode_tile.h"
#include "tile_forward.h"

namespace sparse_attention::decoding {

template <class A>
struct LanesScratch {
  explicit LanesScratch(int dim) : arena(size_t(kLanes) * (2 * dim + 2) + kPanel<A> * (kKeys + 1) + size_t(2) * kKeys * dim) {
    q = arena.take(size_t(kLanes) * dim);
    total = arena.take(size_t(kLanes) * dim);
    k = arena.take(size_t(kKeys) * dim);
    v = arena.take(size_t(kKeys) * dim);
    score = arena.take(kKeys * kPanel<A>);
    maximum = arena.take(kLanes);
    sum = arena.take(kLanes);
    decay = arena.take(kPanel<A>);
  }
  Arena<A> arena;
  A *q, *total, *k, *v, *score, *maximum, *sum, *decay;
};

// The queries that see each live key of a block, and the live keys that each panel needs.
template <class A>
struct LaneBits {
  uint64_t words[kLanes / 64][64];  // by key
  int low[kLanes / kPanel<A>], high[kLanes / kPanel<A>];  // low is even: products may take rows in pairs

  void of(const Block& block, int count) {
    if (block.masked)
      for (int w = 0; w < kLanes / 64; ++w) {
        for (int l = 0; l < 64; ++l) words[w][l] = 64 * w + l < count ? block.seen[64 * w + l] : 0;
        transpose_bits(words[w]);
        for (int r = 0; r < block.n; ++r) words[w][r] = words[w][block.key[r]];
      }
    for (int panel = 0; panel * kPanel<A> < count; ++panel) {
      low[panel] = block.masked ? block.n : 0, high[panel] = block.masked ? 0 : block.n;
      for (int r = 0; block.masked && r < block.n; ++r)
        if (lanes(panel, r)) low[panel] = std::min(low[panel], r & ~1), high[panel] = r + 1;
    }
  }
  uint64_t lanes(int panel, int r) const {
    const int first = panel * kPanel<A>;
    return words[first / 64][r] >> first % 64 & (~uint64_t(0) >> (64 - kPanel<A>));
  }
};

// Turns the dot products of V vectors of lanes into weights, for live keys [low, high), and moves the running maximum and sum.
template <class A, int V>
inline void softmax(const LaneBits<A>* bits, int panel, int low, int high, A log2, A* score, A* maximum, A* sum, A* decay) {
  constexpr int L = Simd<A>::lanes;
  const Vec<A> none = splat(-kInfinity<A>);
  for (int v = 0; v < V; ++v) {
    A* column = score + v * L;
    const Vec<A> before = load(maximum + v * L);
    Vec<A> most = before;
    for (int r = low; r < high; ++r) {
      Vec<A> s = load(column + r * kPanel<A>);
      if (bits) {
        s = select_bits<A>(uint32_t(bits->lanes(panel, r) >> (v * L)), s, none);
        store(column + r * kPanel<A>, s);
      }
      most = s > most ? s : most;
    }
    const Vec<A> origin = most == none ? Vec<A>{} : most;  // a lane that has seen no key yet
    const Vec<A> factor = exp2_nonpositive<A>((before - origin) * log2);
    Vec<A> total = {};
    for (int first = low; first < high; first += 8) {  // in pieces, which round less than one long sum
      Vec<A> part = {};
      for (int r = first; r < std::min(first + 8, high); ++r) {
        const Vec<A> weight = exp2_nonpositive<A>((load(column + r * kPanel<A>) - origin) * log2);
        store(column + r * kPanel<A>, weight);
        part += weight;
      }
      total += part;
    }
    store(maximum + v * L, most);
    store(sum + v * L, load(sum + v * L) * factor + total);
    store(decay + v * L, factor);
  }
}

// The products in the accumulator's type: rows of a narrower type are widened into scratch, once for all panels.
template <class T>
struct WideProducts {
  using A = Acc<T>;
  explicit WideProducts(const DecodeParams& p) : dim(p.head_dim) {}

  void pack(const DecodeParams& p, const Tile& tile, A factor, A* packed) const {
    const T* queries[kLanes];
    for (int l = 0; l < tile.count; ++l) queries[l] = tile.row<const T>(p, p.q, l);
    for (int l0 = 0; l0 < ceil_div(tile.count, kPanel<A>) * kPanel<A>; l0 += 8)
      for (int d0 = 0; d0 < dim; d0 += 8) {
        A block[8][8] = {};
        for (int l = 0; l < 8 && l0 + l < tile.count; ++l) {
          widen(queries[l0 + l] + d0, block[l], 8);
          for (int d = 0; d < 8; ++d) block[l][d] *= factor;
        }
        transpose8(block);
        A* to = packed + (l0 / kPanel<A> * dim + d0) * kPanel<A> + l0 % kPanel<A>;
        for (int d = 0; d < 8; ++d) std::memcpy(to + d * kPanel<A>, block[d], sizeof(block[d]));
      }
  }

  Rows<A> rows(const Cache<T>& cache, const Block& block, A* scratch) const {
    if constexpr (std::is_same_v<T, A>)
      if (!block.packed && cache.regular(block.at(0), block.n)) return {cache.row(block.at(0)), cache.stride};
    for (int r = 0; r < block.n; ++r) widen(cache.row(block.at(r)), scratch + r * dim, dim);
    return {scratch, dim};
  }

  void begin(const Cache<T>& keys, const Cache<T>& values, const Block& block, LanesScratch<A>& s) {
    k = rows(keys, block, s.k);
    v = rows(values, block, s.v);
  }
  template <int V>
  void dot(const A* packed, int panel, int low, int high, A* score, Ahead& ahead) const {
    const A* lanes = packed + panel * dim * kPanel<A>;
    decoding::dot<WideOp<A>, V>(k.data + low * k.stride, k.stride, high - low, lanes, dim, score + low * kPanel<A>, ahead);
  }
  template <int V>
  void round(A*, int, int) const {}
  template <int V>
  void accumulate(const A* weight, int low, int high, const A* decay, A* total, Ahead& ahead) const {
    decoding::accumulate<WideOp<A>, V>(v.data, v.stride, low, high, weight, dim, decay, total, ahead);
  }

  int dim;
  Rows<A> k, v;
};

template <class Products, class A, int V>
inline void panel_step(const Products& products, const LaneBits<A>& bits, bool masked, int panel, int dim, A log2, LanesScratch<A>& s,
                       Ahead& ahead) {
  const int low = bits.low[panel], high = bits.high[panel], lane = panel * kPanel<A>;
  if (low >= high) return;
  products.template dot<V>(s.q, panel, low, high, s.score, ahead);
  softmax<A, V>(masked ? &bits : nullptr, panel, low, high, log2, s.score, s.maximum + lane, s.sum + lane, s.decay);
  products.template round<V>(s.score, low, high);
  products.template accumulate<V>(s.score, low, high, s.decay, s.total + lane * dim, ahead);
}

// rows[lane][d] = total[d][lane] of every panel.
template <class A>
inline void unpack_panels(const A* total, int count, int dim, A* rows) {
  for (int l0 = 0; l0 < count; l0 += 8)
    for (int d0 = 0; d0 < dim; d0 += 8) {
      A block[8][8];
      const A* from = total + (l0 / kPanel<A> * dim + d0) * kPanel<A> + l0 % kPanel<A>;
      for (int d = 0; d < 8; ++d) std::memcpy(block[d], from + d * kPanel<A>, sizeof(block[d]));
      transpose8(block);
      for (int l = 0; l < 8 && l0 + l < count; ++l) std::memcpy(rows + (l0 + l) * dim + d0, block[l], sizeof(block[l]));
    }
}

// What to ask for while `panels` panels pass over a block.
template <class T>
inline Ahead rows_of_block(const Tile& tile, int x, const Cache<T>& keys, const Cache<T>& values, int dim, int panels) {
  Ahead ahead;
  const Keys next = tile.keys(x);
  for (const Cache<T>* cache : {&keys, &values})
    for (int64_t key = next.from; key < next.to; ++key) ahead.rows[ahead.count++] = reinterpret_cast<const char*>(cache->row(key));
  ahead.bytes = dim * int(sizeof(T));
  ahead.together = ceil_div(ahead.count, panels * (kKeys / kBlockRows + dim / kBlockRows));
  return ahead;
}

// Blocks [from, to) of a tile.
template <class T, class Products>
inline Partial<Acc<T>> lanes_item(const DecodeParams& p, const Tile& tile, int from, int to, LanesScratch<Acc<T>>& s) {
  using A = Acc<T>;
  const ScoreScale<A> scale(p.scale);
  const int dim = p.head_dim, panels = ceil_div(tile.count, kPanel<A>);
  const Cache<T> keys(p, p.k, tile.b, tile.kv_head), values(p, p.v, tile.b, tile.kv_head);
  Products products(p);
  products.pack(p, tile, scale.factor, s.q);
  std::fill_n(s.total, size_t(panels) * kPanel<A> * dim, A(0));
  std::fill_n(s.maximum, kLanes, -kInfinity<A>);
  std::fill_n(s.sum, kLanes, A(0));
  Block block;
  LaneBits<A> bits;
  for (int x = from; x < to; ++x) {
    if (!block.select(p, tile, x)) continue;
    bits.of(block, tile.count);
    products.begin(keys, values, block, s);
    Ahead ahead = x + 1 < to ? rows_of_block(tile, x + 1, keys, values, dim, panels) : Ahead();
    for (int panel = 0; panel < panels; ++panel) {
      const bool one = tile.count - panel * kPanel<A> <= Simd<A>::lanes;
      (one ? panel_step<Products, A, 1> : panel_step<Products, A, kPanel<A> / Simd<A>::lanes>)(products, bits, block.masked, panel, dim,
                                                                                               scale.log2, s, ahead);
    }
  }
  for (int l = 0; l < tile.count; ++l) s.maximum[l] *= scale.natural;
  unpack_panels(s.total, tile.count, dim, s.q);  // the queries are done with
  return {s.q, s.maximum, s.sum};
}

}  // namespace sparse_attention::decoding
