// A tile of the decode engine: some queries of one group of heads, the blocks of keys they visit, and where rows lie.
#pragma once
#include "decode_mask.h"
#include "simd.h"
#include "walk.h"

namespace sparse_attention::decoding {

constexpr int kLanes = 128;  // most queries of a tile

// The rows of one request and head of a cache.
template <class T>
struct Cache {
  const T* base;
  int64_t stride, page_stride;
  const int32_t* pages;  // null: not paged
  int shift;

  Cache(const DecodeParams& p, const Tensor4& x, int b, int head)
      : base(static_cast<const T*>(x.data) + head * x.head + (p.block_table ? 0 : b * x.batch)), stride(x.row),
        page_stride(x.batch), pages(p.block_table ? p.block_table + b * p.most_pages : nullptr), shift(p.page_shift) {}

  const T* row(int64_t key) const {
    if (!pages) return base + key * stride;
    return base + pages[key >> shift] * page_stride + (key & ((int64_t(1) << shift) - 1)) * stride;
  }
  // Whether the rows of keys first .. first + n - 1 lie `stride` apart.
  bool regular(int64_t first, int n) const { return !pages || (first >> shift) == ((first + n - 1) >> shift); }
};

// Query l of a tile is query (first + l) % q_len of head kv_head * group + (first + l) / q_len.
struct Tile {
  int b, kv_head, first, count;
  const Request* request;
  Keys sinks, near;       // the keys it visits
  Keys common;            // those of them that all its queries see, beside the first common_sinks
  int64_t common_sinks;

  Tile(const DecodeParams& p, const Request& request, int b, int kv_head, int first, int count)
      : b(b), kv_head(kv_head), first(first), count(count), request(&request) {
    near = {INT64_MAX, 0};
    common = {0, INT64_MAX};
    for (int l = 0; l < std::min(count, p.q_len); ++l) {
      const int i = (first + l) % p.q_len;
      if (request.absent(i)) continue;
      near = {std::min(near.from, request.lowest(i)), std::max(near.to, request.stop(i))};
      common = {std::max(common.from, request.lowest(i)), std::min(common.to, request.common_stop(i))};
    }
    near.from = std::min(near.from, near.to);  // nobody is there: no keys
    sinks = {0, near.to == 0 || p.window < 0 ? 0 : std::min(p.sinks, near.from)};
    common_sinks = p.window < 0 ? 0 : std::min(p.sinks, common.to);
  }

  int sink_blocks() const { return int((sinks.to + kKeys - 1) / kKeys); }
  int blocks() const { return sink_blocks() + int((near.to - near.from + kKeys - 1) / kKeys); }

  // The keys of block x: sinks first.
  Keys keys(int x) const {
    const Keys& range = x < sink_blocks() ? sinks : near;
    const int64_t first = range.from + int64_t(x < sink_blocks() ? x : x - sink_blocks()) * kKeys;
    return {first, std::min(first + kKeys, range.to)};
  }

  int index(const DecodeParams& p, int l) const { return (first + l) % p.q_len; }

  template <class T>
  T* row(const DecodeParams& p, const Tensor4& x, int l) const {
    const int head = kv_head * (p.heads / p.kv_heads) + (first + l) / p.q_len;
    return head_data<T>(x, b, head) + index(p, l) * x.row;
  }

  template <class A>
  A* lse(const DecodeParams& p, int l) const {
    const int head = kv_head * (p.heads / p.kv_heads) + (first + l) / p.q_len;
    return static_cast<A*>(p.lse) + (int64_t(b) * p.heads + head) * p.q_len + index(p, l);
  }
};

// The keys of one visited block that some query of the tile sees.
struct Block {
  int64_t first;
  int n;
  bool masked, packed;    // packed: they are not consecutive
  int key[kKeys];         // first + key[r] is live key r
  uint64_t seen[kLanes];  // by query: bit c is key first + c (masked only)

  // Block x of the tile; false where nobody sees any of it.
  bool select(const DecodeParams& p, const Tile& tile, int x) {
    const Keys keys = tile.keys(x);
    first = keys.from;
    n = int(keys.to - keys.from);
    packed = false;
    masked = !(first + n <= tile.common_sinks || (first >= tile.common.from && first + n <= tile.common.to));
    if (!masked) return true;
    uint64_t any = 0;
    for (int l = 0; l < tile.count; ++l) {
      if (l >= p.q_len) {
        seen[l] = seen[l - p.q_len];
        continue;
      }
      const int i = tile.index(p, l);
      seen[l] = tile.request->absent(i) ? 0 : tile.request->seen(i, first) & range_bits(0, n, 0);
      any |= seen[l];
    }
    n = 0;
    for (; any; any &= any - 1) key[n++] = __builtin_ctzll(any);
    if (n == 0) return false;
    packed = key[n - 1] - key[0] != n - 1;
    return true;
  }

  int64_t at(int r) const { return first + (masked ? key[r] : r); }
};

// What a tile, or the part of its keys that one item took, comes to: sums of weight * value, not yet divided by the sum of weights.
template <class A>
struct Partial {
  A* rows;     // [count, head_dim]
  A* maximum;  // [count], scores times scale
  A* sum;      // [count]
};

template <class T>
inline void write(const DecodeParams& p, const Tile& tile, int l, const Acc<T>* row, Acc<T> maximum, Acc<T> sum) {
  using A = Acc<T>;
  alignas(64) A scaled[256];
  const bool nothing = sum == A(0) || tile.request->absent(tile.index(p, l));
  const A factor = nothing ? A(0) : A(1) / sum;
  for (int d = 0; d < p.head_dim; ++d) scaled[d] = nothing ? A(0) : row[d] * factor;
  narrow(scaled, tile.row<T>(p, p.out, l), p.head_dim);
  *tile.lse<A>(p, l) = nothing ? -kInfinity<A> : maximum + std::log(sum);
}

}  // namespace sparse_attention::decoding
