// Which keys a new query sees, as bits: the prefix, then ancestors or the earlier new keys, cut by a window and sinks.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "decode.h"

namespace sparse_attention::decoding {

constexpr int kKeys = 64;  // keys of a block: a query's view of them is one word

// Bits [from, to) of a word whose bit 0 stands for key `first`.
inline uint64_t range_bits(int64_t from, int64_t to, int64_t first) {
  const int64_t low = std::clamp<int64_t>(from - first, 0, 64), high = std::clamp<int64_t>(to - first, 0, 64);
  if (low >= high) return 0;
  return (~uint64_t(0) >> (64 - (high - low))) << low;
}

// A range of keys.
struct Keys {
  int64_t from, to;
};

// One request: its lengths and, for a tree, the words and depths of its nodes.
class Request {
 public:
  Request(const DecodeParams& p, int b)
      : q_len(p.q_len), words((p.q_len + 63) / 64), window(p.window), sinks(p.sinks), length(p.lengths[b]),
        prefix(p.lengths[b] - p.q_len), tree(p.ancestors ? p.ancestors + b * p.ancestors_batch : nullptr) {
    if (tree && window >= 0) cut_by_window();
  }

  // A query that is not there: no node of the tree, or before the first row.
  bool absent(int i) const {
    if (prefix + i < 0) return true;
    if (!tree) return false;
    for (int w = 0; w < words; ++w)
      if (tree[int64_t(i) * words + w] & valid(w)) return false;
    return true;
  }

  // The keys first .. first + 63 that query i, which is there, sees.
  uint64_t seen(int i, int64_t first) const {
    const int64_t low = lowest(i), stop = tree ? prefix : prefix + i + 1;
    uint64_t bits = range_bits(low, stop, first) | range_bits(0, std::min(sinks, stop), first);
    if (!tree || first + 63 < prefix) return bits;
    const uint64_t* row = (cut.empty() ? tree : cut.data()) + int64_t(i) * words;
    const int64_t node = first - prefix;  // that bit 0 stands for
    if (node < 0) return bits | (row[0] & valid(0)) << -node;
    const int64_t w = node / 64, shift = node % 64;
    if (w < words) bits |= (row[w] & valid(w)) >> shift;
    if (shift && w + 1 < words) bits |= (row[w + 1] & valid(w + 1)) << (64 - shift);
    return bits;
  }

  // The first key inside the window of query i; in a tree no later than the first node.
  int64_t lowest(int i) const {
    const int64_t low = window < 0 ? 0 : prefix + depth(i) - window + 1;
    return std::max<int64_t>(0, tree ? std::min(low, prefix) : low);
  }

  // Where the keys end that every query from i on sees.
  int64_t common_stop(int i) const { return std::max<int64_t>(0, tree ? prefix : prefix + i + 1); }

  // Where the keys end that queries up to i see.
  int64_t stop(int i) const { return std::max<int64_t>(0, tree ? length : prefix + i + 1); }

  const int q_len, words;
  const int64_t window, sinks, length, prefix;

 private:
  uint64_t valid(int w) const { return range_bits(0, q_len, 64 * int64_t(w)); }
  int depth(int i) const { return tree ? depths[i] : i; }

  void cut_by_window() {
    depths.resize(q_len);
    int deepest = 0;
    for (int i = 0; i < q_len; ++i) {
      int count = 0;
      for (int w = 0; w < words; ++w) count += __builtin_popcountll(tree[int64_t(i) * words + w] & valid(w));
      depths[i] = count - 1;
      deepest = std::max(deepest, depths[i]);
    }
    if (deepest + 1 < window) return;
    cut.assign(tree, tree + int64_t(q_len) * words);
    for (int i = 0; i < q_len; ++i)
      for (int w = 0; w < words; ++w) {
        uint64_t& word = cut[int64_t(i) * words + w];
        for (uint64_t left = word & valid(w); left; left &= left - 1) {
          const int bit = __builtin_ctzll(left), node = 64 * w + bit;
          const bool near = depths[i] - depths[node] < window || prefix + depths[node] < sinks;
          if (!near) word &= ~(uint64_t(1) << bit);
        }
      }
  }

  const uint64_t* tree;       // [q_len, words], or null
  std::vector<int> depths;    // with a window only
  std::vector<uint64_t> cut;  // the words inside the window, where that makes a difference
};

// Row r of the answer is column r of what was there (Warren, Hacker's Delight, 7-3; bit 0 is column 0).
inline void transpose_bits(uint64_t (&rows)[64]) {
  uint64_t mask = 0x00000000ffffffffull;
  for (int step = 32; step; step >>= 1, mask ^= mask << step)
    for (int r = 0; r < 64; r = ((r | step) + 1) & ~step) {
      const uint64_t swapped = ((rows[r] >> step) ^ rows[r | step]) & mask;
      rows[r | step] ^= swapped;
      rows[r] ^= swapped << step;
    }
}

}  // namespace sparse_attention::decoding
