// Which keys the queries of one request see: the prefix, a tree's ancestors or the new keys up to a query's own, a window, sinks, pages.
#pragma once
#include "../decode.h"

namespace sparse_attention {

__device__ __forceinline__ uint64_t low_bits(int count) { return count >= 64 ? ~uint64_t{0} : count <= 0 ? 0 : (uint64_t{1} << count) - 1; }

// Whether each key is read once, where `rows` rows share one reading of it. Requests may share pages.
__host__ __device__ inline bool reads_once(const Decode& d, int rows) {
  return d.group * d.q_len <= rows && (d.batch == 1 || !d.block_table);
}

// Two words of a node's ancestors, one behind the other.
struct Words {
  uint64_t first, second;
};

// Which query a row is; its head in the group is what is left.
__device__ __forceinline__ int query_of_row(const Decode& d, int row) {
  const uint32_t query = uint64_t{uint32_t(row)} * d.group_inverse >> 32;  // or one more
  return query * d.group > uint32_t(row) ? query - 1 : query;
}

__device__ __forceinline__ int64_t length_of(const Decode& d, int batch) { return d.lengths ? d.lengths[batch] : d.length; }

// What is no length that a request may have is none.
__device__ __forceinline__ int length_within(const Decode& d, int64_t wanted) {
  return static_cast<int>(wanted < 0 || wanted > d.capacity ? 0 : wanted);
}

// The ancestor words of a request, as is, or null.
__device__ __forceinline__ const uint64_t* ancestors_of(const Decode& d, int batch) {
  return d.ancestors ? d.ancestors + int64_t{d.ancestor_batch == 1 ? 0 : batch} * d.q_len * d.words : nullptr;
}

// Whether a row of the ancestor words is a node's; true where there is no tree, or no such row.
__device__ __forceinline__ bool is_node(const Decode& d, int batch, int node) {
  return !d.ancestors || node >= d.q_len || ancestors_of(d, batch)[int64_t{node} * d.words + node / 64] >> (node % 64) & 1;
}

// Which words of 64 new keys some of `rows` rows from first_row on sees, in a tree that is large enough for that to matter; else all. By
// all threads of a block, with barriers.
__device__ __forceinline__ uint32_t used_words(const Decode& d, uint32_t* scratch, int batch, int first_row, int rows, int threads) {
  if (!d.ancestors || d.words <= 2) return ~0u;
  if (threadIdx.x == 0) *scratch = 0;
  __syncthreads();
  const uint64_t* ancestors = ancestors_of(d, batch);
  uint32_t found = 0;
  const int first = query_of_row(d, first_row) * d.words, last = (query_of_row(d, min(first_row + rows, d.group * d.q_len) - 1) + 1) * d.words;
#pragma unroll 4
  for (int n = first + threadIdx.x; n < last; n += threads)
    if (ancestors[n]) found |= 1u << uint32_t(n) % uint32_t(d.words);
  if (found) atomicOr(scratch, found);
  __syncthreads();
  return *scratch;
}

// Which tiles of kKeys keys one block visits, and which keys of them somebody sees.
template <int kKeys>
struct Span {
  const Decode& d;
  const uint64_t* ancestors;  // of this request, as is
  const int32_t* table;       // its pages, or null
  int page_shift;
  int length, prefix;         // keys, and those before the new ones
  int low;                    // the first key that a window leaves, sinks aside
  int sink_tiles, window_tile;
  int visited;      // tiles, by all blocks
  int first, last;  // of this block's share
  uint32_t used;  // of used_words

  // wanted: length_of(d, batch). rows: of the block, from first_row on; what lies behind the last key that they may see without a tree is
  // not visited.
  __device__ Span(const Decode& d, int64_t wanted, uint32_t used, int batch, int split, int first_row, int rows) : d(d), used(used) {
    length = length_within(d, wanted);
    table = d.block_table ? d.block_table + int64_t{batch} * d.table_width : nullptr;
    page_shift = table ? __ffsll(d.page) - 1 : 0;
    prefix = length - d.q_len;
    low = d.window < 0 ? 0 : max(0, prefix - d.window + 1);
    ancestors = ancestors_of(d, batch);
    const int newest = ancestors ? d.q_len : min(d.q_len, query_of_row(d, first_row + rows - 1) + 1);
    const int tiles = (max(0, prefix + newest) + kKeys - 1) / kKeys;
    window_tile = low / kKeys;
    sink_tiles = min((d.sinks + kKeys - 1) / kKeys, window_tile);
    visited = sink_tiles + max(0, tiles - window_tile);
    const int each = visited / d.splits, rest = visited - each * d.splits;
    first = each * split + min(split, rest);
    last = first + each + (split < rest);
  }

  __device__ __forceinline__ int tile(int visit) const { return visit < sink_tiles ? visit : window_tile + visit - sink_tiles; }

  // The next visit, from this one on, to a tile of which something may be seen.
  __device__ __forceinline__ int next(int visit) const {
    if (used != ~0u)
      while (visit < last && !may_see(visit)) ++visit;
    return visit;
  }

  // Whether something of a visit's tile may be seen.
  __device__ __forceinline__ bool may_see(int visit) const {
    const int begin = tile(visit) * kKeys - prefix, end = begin + kKeys - 1;  // among the new keys
    return begin < 0 || used & (low_bits(end / 64 + 1) & ~low_bits(begin / 64));
  }

  // Whether every query sees the whole tile.
  __device__ __forceinline__ bool full(int tile) const {
    const int begin = tile * kKeys, end = begin + kKeys;
    const bool behind_all = d.window < 0 || end <= d.sinks || begin > prefix + d.q_len - 1 - d.window;
    if (end > prefix || !behind_all) return false;
    for (int key = begin; table && key < end; key += d.page)
      if (!there(key)) return false;
    return true;
  }

  // Whether a key's page is one of the cache's.
  __device__ __forceinline__ bool there(int key) const {
    return !table || static_cast<uint32_t>(table[key >> page_shift]) < static_cast<uint32_t>(d.pages);
  }

  __device__ __forceinline__ bool node_alive(int node) const { return ancestors[int64_t{node} * d.words + node / 64] >> (node % 64) & 1; }

  // How far behind the prefix a query stands.
  __device__ __forceinline__ int depth(int query) const {
    if (!ancestors || d.window < 0) return query;
    int found = -1;
#pragma unroll 1
    for (int w = 0; w < d.words; ++w) found += __popcll(ancestors[int64_t{query} * d.words + w]);
    return found;
  }

  // Whether a key is in the cache and before no window.
  __device__ __forceinline__ bool kept(int key) const { return key < length && (key >= low || key < d.sinks) && there(key); }

  // The words that hold the 64 new keys from `base` on. query: may be -1
  __device__ __forceinline__ Words words_of(int query, int base) const {
    if (!ancestors || query < 0) return {0, 0};
    const uint64_t* row = ancestors + int64_t{query} * d.words;
    const int word = max(base, 0) / 64;
    return {word < d.words ? row[word] : 0, word + 1 < d.words ? row[word + 1] : 0};
  }

  // Of the 64 keys from prefix + base on: those that a query of this depth and with these words sees.
  __device__ __forceinline__ uint64_t seen(int query, int depth, int base, Words words) const {
    uint64_t bits;
    if (!ancestors) {
      bits = low_bits(query + 1 - base);
    } else {
      const int shift = base % 64;
      if (base < 0) bits = base <= -64 ? ~uint64_t{0} : low_bits(-base) | words.first << -base;
      else bits = shift ? words.first >> shift | words.second << (64 - shift) : words.first;
      bits &= low_bits(d.q_len - base);
    }
    if (d.window >= 0) {
      const int gone = depth - d.window + 1;  // positions from the prefix's end on that the window has left; in a tree, depths
      bits &= ~low_bits((ancestors ? min(gone, 0) : gone) - base) | low_bits(d.sinks - prefix - base);
      if (ancestors && gone > 0) bits = near(bits, gone, base);
    }
    for (int key = 0; table && key < 64; key += min(64, d.page))
      if (const int at = prefix + base + key; at < length && !there(max(0, at))) bits &= ~(low_bits(key + min(64, d.page)) & ~low_bits(key));
    return bits & ~low_bits(-prefix - base);  // no key stands before the first
  }

  // Without the ancestors that stand less than `gone` deep and are no sinks.
  __device__ __noinline__ uint64_t near(uint64_t bits, int gone, int base) const {
    for (uint64_t left = bits & ~low_bits(-base); left; left &= left - 1) {
      const int at = __ffsll(left) - 1, deep = depth(base + at);
      if (deep < gone && prefix + deep >= d.sinks) bits &= ~(uint64_t{1} << at);
    }
    return bits;
  }
};

}  // namespace sparse_attention
