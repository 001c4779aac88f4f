// A few queries over a long cache: the queries of a group of heads share a tile, the keys are split over blocks, and the prefix is as
// long as device memory says when the kernel runs.
#pragma once
#include <new>

#include "../decode.h"
#include "consumer.cuh"

namespace sparse_attention::sm90 {

struct CacheMaps {
  CUtensorMap k, v;  // (column, 0, row of a page, head, page); without pages a request is one page
};

__device__ __forceinline__ uint64_t low_bits(int count) { return count >= 64 ? ~uint64_t{0} : count <= 0 ? 0 : (uint64_t{1} << count) - 1; }

// Which key tiles one block visits, and which keys of them somebody sees.
template <class S>
struct Span {
  const Decode& d;
  const uint64_t* ancestors;  // of this request, as is
  const int32_t* table;       // its pages, or null
  int length, prefix;         // keys, and those before the new ones
  int low;                    // the first key that a window leaves, sinks aside
  int sink_tiles, window_tile;
  int first, last;  // of this block's share, in tiles visited

  __device__ Span(const Decode& d, int batch, int split) : d(d) {
    const int64_t wanted = d.lengths[batch];
    length = static_cast<int>(wanted < 0 || wanted > d.capacity ? 0 : wanted);
    table = d.block_table ? d.block_table + int64_t{batch} * d.table_width : nullptr;
    prefix = length - d.q_len;
    low = d.window < 0 ? 0 : max(0, prefix - d.window + 1);
    ancestors = d.ancestors ? d.ancestors + int64_t{d.ancestor_batch == 1 ? 0 : batch} * d.q_len * d.words : nullptr;
    const int tiles = (length + S::kKeys - 1) / S::kKeys;
    window_tile = low / S::kKeys;
    sink_tiles = min((d.sinks + S::kKeys - 1) / S::kKeys, window_tile);
    const int visited = sink_tiles + max(0, tiles - window_tile);
    first = static_cast<int>(int64_t{visited} * split / d.splits);
    last = static_cast<int>(int64_t{visited} * (split + 1) / d.splits);
  }

  __device__ __forceinline__ int tile(int visit) const { return visit < sink_tiles ? visit : window_tile + visit - sink_tiles; }

  // Whether every query sees the whole tile.
  __device__ __forceinline__ bool full(int tile) const {
    const int begin = tile * S::kKeys, end = begin + S::kKeys;
    const bool behind_all = d.window < 0 || end <= d.sinks || begin > prefix + d.q_len - 1 - d.window;
    if (end > prefix || !behind_all) return false;
    for (int key = begin; table && key < end; key += d.page)
      if (!there(key)) return false;
    return true;
  }

  // Whether a key's page is one of the cache's.
  __device__ __forceinline__ bool there(int key) const { return !table || static_cast<uint32_t>(table[key / d.page]) < static_cast<uint32_t>(d.pages); }

  // The query of a row; -1 for a row past the end, a query before the first key, and a node that is none.
  __device__ __forceinline__ int query_of(int row) const {
    const int query = row % d.q_len;
    return row < d.heads / d.kv_heads * d.q_len && prefix + query >= 0 && (!ancestors || node_alive(query)) ? query : -1;
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

  // Whether any query may see a key.
  __device__ __forceinline__ bool alive(int key) const {
    if (key >= length || (key < low && key >= d.sinks) || !there(key)) return false;
    return !ancestors || key < prefix || node_alive(key - prefix);
  }

  // Of the 64 keys from prefix + base on: those that a query of this depth sees.
  __device__ __forceinline__ uint64_t seen(int query, int depth, int base) const {
    uint64_t bits;
    if (!ancestors) {
      bits = low_bits(query + 1 - base);
    } else {
      const uint64_t* row = ancestors + int64_t{query} * d.words;
      if (base < 0) {
        bits = base <= -64 ? ~uint64_t{0} : low_bits(-base) | row[0] << -base;
      } else {
        const int word = base / 64, shift = base % 64;
        bits = word < d.words ? row[word] >> shift : 0;
        if (shift && word + 1 < d.words) bits |= row[word + 1] << (64 - shift);
      }
      bits &= low_bits(d.q_len - base);
    }
    if (d.window >= 0) bits &= ~low_bits(depth - d.window + 1 - base) | low_bits(d.sinks - prefix - base);
    for (int key = 0; table && key < 64; key += min(64, d.page))
      if (const int at = prefix + base + key; at < length && !there(max(0, at))) bits &= ~(low_bits(key + min(64, d.page)) & ~low_bits(key));
    return bits & ~low_bits(-prefix - base);  // no key stands before the first
  }
};

// What one warp works out for the others: which keys each row of a tile sees, and which keys nobody does. A slot is written anew when the
// tile after next but one has been scored, and nobody reads it then.
template <class S>
struct alignas(1024) Decoding : Shared<S> {
  static constexpr int kSlots = 2 * S::kStages, kWords = S::kKeys / 64;
  uint64_t seen[kSlots][S::kQueries][kWords], alive[kSlots][kWords];
};

// One thread copies this block's key tiles in.
template <class S>
__device__ __forceinline__ void copy_cache(const Span<S>& span, const CacheMaps& maps, Decoding<S>& shared, int kv_head, int batch) {
  const Decode& d = span.d;
  const int rows = d.block_table ? min(S::kKeys, d.page) : S::kKeys, newest = (span.length - 1) / d.page;
  Ring<S::kStages> ring;
  const auto copy = [&](const CUtensorMap* map, uint8_t* to, uint64_t* barrier, int tile) {
    barrier_expect(barrier, S::kBlocks * S::kKeyBlock);
    for (int row = 0; row < S::kKeys; row += rows) {
      int page = batch, at = tile * S::kKeys + row;
      if (d.block_table) {
        page = span.table[min(at / d.page, newest)];
        page = min(max(page, 0), d.pages - 1), at %= d.page;
      }
#pragma unroll
      for (int b = 0; b < S::kBlocks; ++b) tensor_load(to + b * S::kKeyBlock + row * 128, map, barrier, 64 * b, 0, at, kv_head, page);
    }
  };
  for (int visit = span.first; visit < span.last; ++visit, ring.next()) {
    const int tile = span.tile(visit), stage = ring.stage;
    barrier_wait(&shared.k_empty[stage], ring.phase ^ 1);
    shared.mask[stage] = (span.full(tile) ? kFull : visit % Decoding<S>::kSlots | kDead) | (visit + 1 == span.last ? kLast : 0);
    copy(&maps.k, shared.k[stage], &shared.k_full[stage], tile);
    barrier_wait(&shared.v_empty[stage], ring.phase ^ 1);
    copy(&maps.v, shared.v[stage], &shared.v_full[stage], tile);
  }
}

// One warp makes the masks of this block's key tiles.
template <class S>
__device__ __forceinline__ void make_masks(const Span<S>& span, Decoding<S>& shared, int query_tile) {
  const int lane = threadIdx.x % 32;
  Ring<S::kStages> ring;
  for (int visit = span.first; visit < span.last; ++visit, ring.next()) {
    const int tile = span.tile(visit), slot = visit % Decoding<S>::kSlots;
    barrier_wait(&shared.k_empty[ring.stage], ring.phase ^ 1);
    if (!span.full(tile)) {
#pragma unroll 1
      for (int row = lane; row < S::kQueries; row += 32) {
        const int query = span.query_of(S::kQueries * query_tile + row), depth = query < 0 ? 0 : span.depth(query);
#pragma unroll 1
        for (int w = 0; w < Decoding<S>::kWords; ++w)
          shared.seen[slot][row][w] = query < 0 ? 0 : span.seen(query, depth, tile * S::kKeys + 64 * w - span.prefix);
      }
      auto* alive = reinterpret_cast<uint32_t*>(shared.alive[slot]);
#pragma unroll 1
      for (int half = 0; half < S::kKeys / 32; ++half) {
        const uint32_t bits = __ballot_sync(~0u, span.alive(tile * S::kKeys + 32 * half + lane));
        if (lane == 0) alive[half] = bits;
      }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(&shared.k_full[ring.stage]);
  }
}

template <class S, typename T>
struct Decoder : Attend<S, T, true, Decoder<S, T>> {
  using Base = Attend<S, T, true, Decoder>;
  using Base::group, Base::lane, Base::out, Base::shared, Base::thread, Base::warp, Base::kChunk, Base::kChunks, Base::kScores, Base::kWide;

  const Span<S>& span;
  const Decoding<S>& masks;
  const Decode& d;
  const int tile;  // of the rows

  __device__ Decoder(const Span<S>& span, Decoding<S>& shared, float scale_log2, int tile)
      : Base(shared, scale_log2), span(span), masks(shared), d(span.d), tile(tile) {}

  // Asked again where needed: registers are for the products.
  __device__ __forceinline__ int batch() const { return blockIdx.z; }
  __device__ __forceinline__ int rows() const { return d.heads / d.kv_heads * d.q_len; }
  __device__ __forceinline__ int kv_head() const { return blockIdx.y / ((rows() + S::kQueries - 1) / S::kQueries); }
  __device__ __forceinline__ int row_of(int r) const { return S::kQueries * tile + group * 64 + warp * 16 + lane / 4 + 8 * r; }

  __device__ __forceinline__ int64_t place(const Strided& x, int at) const {
    return batch() * x.batch + (int64_t{kv_head()} * (d.heads / d.kv_heads) + at / d.q_len) * x.head + at % d.q_len * x.row;
  }

  // This warpgroup's queries, as the tensor copy engine would lay them out.
  __device__ __forceinline__ void copy_queries() {
    constexpr int kPieces = S::kDim / 8;  // of 16 bytes, a row
    for (int n = thread; n < 64 * kPieces; n += 128) {
      const int local = group * 64 + n / kPieces, piece = n % kPieces, at = S::kQueries * tile + local;
      uint4 value{0, 0, 0, 0};
      if (at < rows() && 8 * piece < d.head_dim) value = *reinterpret_cast<const uint4*>(static_cast<const T*>(d.q.data) + place(d.q, at) + 8 * piece);
      *reinterpret_cast<uint4*>(shared.q + piece / 8 * S::kQueryBlock + local * 128 + (piece % 8 ^ local % 8) * 16) = value;
    }
    fence_async();
    named_sync<128>(4 + group);
  }

  __device__ __forceinline__ void scored_last() {}

  __device__ __forceinline__ void hide(float (&s)[kScores], int mask) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int w = 0; w < S::kKeys / 64; ++w) this->hide_word(s, r, w, masks.seen[mask & ~kDead][group * 64 + warp * 16 + lane / 4 + 8 * r][w]);
  }

  __device__ __forceinline__ void bury(int mask, int stage) {
    for (int key = thread; key < S::kKeys; key += 128)
      if (!(masks.alive[mask & ~kDead][key / 64] >> (key % 64) & 1)) this->zero_value(key, stage);
    fence_async();
    named_sync<128>(4 + group);
  }

  __device__ void run() {
    Ring<S::kStages> k_ring, v_ring;
    copy_queries();
    this->begin();
    if (group == 1) this->your_turn();
    if (span.first < span.last) this->attend(k_ring, v_ring);
    if (group == 0) this->my_turn();  // leaves no arrival behind
    float keep[2], lse[2];
    this->close(keep, lse);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = row_of(r);
      if (row >= rows()) continue;
      if (span.query_of(row) < 0) keep[r] = 0, lse[r] = -INFINITY;
      d.splits == 1 ? write(r, row, keep[r], lse[r]) : write_part(r, row, keep[r], lse[r]);
    }
  }

  __device__ __forceinline__ void write(int r, int row, float keep, float lse) {
    if (lane % 4 == 0) d.lse[(int64_t{batch()} * d.heads + kv_head() * (d.heads / d.kv_heads)) * d.q_len + row] = lse;
    T* to = static_cast<T*>(d.out.data) + place(d.out, row);
    each(r, [&](int column, float x, float y) { *reinterpret_cast<uint32_t*>(to + column) = pack<T>(x * keep, y * keep); });
  }

  __device__ __forceinline__ void write_part(int r, int row, float keep, float lse) {
    const int64_t at = ((int64_t{blockIdx.x} * d.batch + batch()) * d.kv_heads + kv_head()) * rows() + row;
    if (lane % 4 == 0) d.part_lse[at] = lse;
    if (lse == -INFINITY) return;  // nobody reads what has no weight
    float* to = d.part_out + at * d.head_dim;
    each(r, [&](int column, float x, float y) { *reinterpret_cast<float2*>(to + column) = float2{x * keep, y * keep}; });
  }

  // Calls take(column, x, y) for each pair of columns of one of this thread's rows.
  template <class Take>
  __device__ __forceinline__ void each(int r, Take take) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < kChunk / 4; ++i) {
        const int column = c * kWide + 8 * i + lane % 4 * 2;
        if (column < d.head_dim) take(column, out[c][4 * i + 2 * r], out[c][4 * i + 2 * r + 1]);
      }
  }
};

// grid: (splits, kv_heads * query tiles, batch)
template <class S, typename T>
__global__ void __launch_bounds__(S::kThreads, 1) decode(const __grid_constant__ CacheMaps maps, const __grid_constant__ Decode d, int tiles) {
  extern __shared__ uint8_t raw[];
  auto& shared = *reinterpret_cast<Decoding<S>*>((reinterpret_cast<uintptr_t>(raw) + 1023) / 1024 * 1024);
  __shared__ alignas(Span<S>) uint8_t span_memory[sizeof(Span<S>)];  // read rarely: registers are for the products
  const int batch = blockIdx.z, kv_head = blockIdx.y / tiles, tile = blockIdx.y % tiles;
  if (threadIdx.x == 0) {
    init_barriers(shared, 2);
    new (span_memory) Span<S>(d, batch, blockIdx.x);
  }
  __syncthreads();
  const auto& span = *reinterpret_cast<const Span<S>*>(span_memory);
  if (threadIdx.x < 128) {
    registers_fewer<40>();
    if (threadIdx.x == 0) copy_cache<S>(span, maps, shared, kv_head, batch);
    if (threadIdx.x / 32 == 1) make_masks<S>(span, shared, tile);
  } else {
    registers_more<232>();
    Decoder<S, T> decoder(span, shared, d.scale * 1.4426950408889634f, tile);
    decoder.run();
  }
}

// A warp joins the splits of one row. grid: (rows / 4, kv_heads, batch), 4 warps
template <typename T>
__global__ void __launch_bounds__(128) join(const __grid_constant__ Decode d) {
  const int lane = threadIdx.x % 32, group = d.heads / d.kv_heads, rows = group * d.q_len;
  const int row = blockIdx.x * 4 + threadIdx.x / 32, kv_head = blockIdx.y, batch = blockIdx.z;
  if (row >= rows) return;
  const int64_t step = int64_t{d.batch} * d.kv_heads * rows, at = (int64_t{batch} * d.kv_heads + kv_head) * rows + row;
  float top = -INFINITY;
  for (int s = lane; s < d.splits; s += 32) top = fmaxf(top, d.part_lse[s * step + at]);
  for (int x = 16; x; x /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, x));
  const float base = top == -INFINITY ? 0 : top;
  float all = 0;
  float sum[4][2] = {};  // columns 64 i + 2 lane and the next
  for (int s = 0; s < d.splits; ++s) {
    const float weight = __expf(d.part_lse[s * step + at] - base);
    if (weight == 0) continue;
    all += weight;
    const float* from = d.part_out + (s * step + at) * d.head_dim;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (const int column = 64 * i + 2 * lane; column < d.head_dim) {
        const float2 x = *reinterpret_cast<const float2*>(from + column);
        sum[i][0] = fmaf(weight, x.x, sum[i][0]), sum[i][1] = fmaf(weight, x.y, sum[i][1]);
      }
  }
  const int64_t head = int64_t{kv_head} * group + row / d.q_len;
  if (lane == 0) d.lse[(int64_t{batch} * d.heads + head) * d.q_len + row % d.q_len] = all == 0 ? -INFINITY : top + __logf(all);
  const float keep = all == 0 ? 0 : 1 / all;
  T* to = static_cast<T*>(d.out.data) + batch * d.out.batch + head * d.out.head + row % d.q_len * d.out.row;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (const int column = 64 * i + 2 * lane; column < d.head_dim)
      *reinterpret_cast<uint32_t*>(to + column) = pack<T>(sum[i][0] * keep, sum[i][1] * keep);
}

}  // namespace sparse_attention::sm90
