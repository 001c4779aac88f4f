// A few queries over a long cache: the queries of a group of heads share a tile, the keys are split over blocks, and the prefix is as
// long as device memory says when the kernel runs.
#pragma once
#include <new>

#include "../decode/join.cuh"
#include "../decode/span.cuh"
#include "consumer.cuh"

namespace sparse_attention::sm90 {

struct CacheMaps {
  CUtensorMap k, v;  // (column, 0, row of a page, head, page); without pages a request is one page
};

// The output leaves from registers: its memory holds another stage.
template <int kDim, int kKeys, int kStages>
struct CacheShape : Shape<kDim, kKeys, kStages> {
  static constexpr bool kShare = true;
};

// One thread copies this block's key tiles in.
template <class S>
__device__ __forceinline__ void copy_cache(const Span<S::kKeys>& span, const CacheMaps& maps, Shared<S>& shared, int kv_head, int batch) {
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
  for (int visit = span.next(span.first), following; visit < span.last; visit = following, ring.next()) {
    const int tile = span.tile(visit), stage = ring.stage;
    following = span.next(visit + 1);
    barrier_wait(&shared.k_empty[stage], ring.phase ^ 1);
    shared.mask[stage] = (span.full(tile) ? kFull : tile | kDead) | (following >= span.last ? kLast : 0);
    copy(&maps.k, shared.k[stage], &shared.k_full[stage], tile);
    barrier_wait(&shared.v_empty[stage], ring.phase ^ 1);
    copy(&maps.v, shared.v[stage], &shared.v_full[stage], tile);
  }
}

// One piece of code for all words of a tile: it comes from far away in a first call.
template <int kKeys>
__device__ __noinline__ uint64_t seen_by(const Span<kKeys>& span, int query, int base, Words words) {
  return query < 0 ? 0 : span.seen(query, span.depth(query), base, words);
}

template <class S, typename T>
struct Decoder : Attend<S, T, true, Decoder<S, T>> {
  using Base = Attend<S, T, true, Decoder>;
  using Base::group, Base::lane, Base::out, Base::shared, Base::thread, Base::warp, Base::kChunk, Base::kChunks, Base::kScores, Base::kWide;

  const Span<S::kKeys>& span;
  const Decode& d;
  int query[2];    // of this thread's rows, or -1

  __device__ Decoder(const Span<S::kKeys>& span, Shared<S>& shared, float scale_log2) : Base(shared, scale_log2), span(span), d(span.d) {}

  // Asked again where needed: registers are for the products.
  __device__ __forceinline__ int batch() const { return blockIdx.z; }
  __device__ __forceinline__ int rows() const { return d.heads / d.kv_heads * d.q_len; }
  __device__ __forceinline__ int tiles() const { return (rows() + S::kQueries - 1) / S::kQueries; }
  __device__ __forceinline__ int kv_head() const { return blockIdx.y / tiles(); }
  __device__ __forceinline__ int tile() const { return tiles() - 1 - blockIdx.y % tiles(); }
  __device__ __forceinline__ int row_of(int r) const { return S::kQueries * tile() + group * 64 + warp * 16 + lane / 4 + 8 * r; }

  // This warpgroup's queries, as the tensor copy engine would lay them out; all asked for before one is waited for.
  __device__ __forceinline__ void copy_queries() {
    constexpr int kPieces = S::kDim / 8, kRows = 128 / kPieces;  // of 16 bytes, a row; at a time
    const int piece = thread % kPieces;
    uint4 values[64 / kRows];
#pragma unroll
    for (int i = 0; i < 64 / kRows; ++i) {
      const int at = S::kQueries * tile() + group * 64 + thread / kPieces + i * kRows;
      const bool real = at < rows() && 8 * piece < d.head_dim;
      values[i] = real ? *reinterpret_cast<const uint4*>(decoding::row_of<T>(d, d.q, batch(), kv_head(), at) + 8 * piece) : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int i = 0; i < 64 / kRows; ++i) {
      const int local = group * 64 + thread / kPieces + i * kRows;
      *reinterpret_cast<uint4*>(shared.q + piece / 8 * S::kQueryBlock + local * 128 + (piece % 8 ^ local % 8) * 16) = values[i];
    }
    fence_async();
    named_sync<128>(4 + group);
  }

  __device__ __forceinline__ void scored_last() {}

  // Each thread works out what its two rows see of a tile: few tiles hold new keys or the end of a window.
  __device__ __forceinline__ void hide(float (&s)[kScores], int mask) {
    constexpr int kWords = S::kKeys / 64;
    const int base = (mask & ~kDead) * S::kKeys - span.prefix;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      Words words[kWords];
#pragma unroll
      for (int w = 0; w < kWords; ++w) words[w] = span.words_of(query[r], base + 64 * w);
#pragma unroll
      for (int w = 0; w < kWords; ++w) this->hide_word(s, r, w, seen_by(span, query[r], base + 64 * w, words[w]));
    }
  }

  __device__ __forceinline__ void bury(int mask, int stage) {
    for (int local = thread; local < S::kKeys; local += 128)
      if (const int key = (mask & ~kDead) * S::kKeys + local; !span.kept(key) || span.orphan(key)) this->zero_value(local, stage);
    fence_async();
    named_sync<128>(4 + group);
  }

  __device__ void run() {
    Ring<S::kStages> k_ring, v_ring;
    copy_queries();
#pragma unroll
    for (int r = 0; r < 2; ++r) query[r] = span.query_of(row_of(r));
    this->begin();
    if (group == 1) this->your_turn();
    if (span.next(span.first) < span.last) this->attend(k_ring, v_ring);
    decoding::allow_next();
    if (group == 0) this->my_turn();  // leaves no arrival behind
    float keep[2], lse[2];
    this->close(keep, lse);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = row_of(r);
      if (row >= rows()) continue;
      if (query[r] < 0) keep[r] = 0, lse[r] = -INFINITY;
      d.splits == 1 ? write(r, row, keep[r], lse[r]) : write_part(r, row, keep[r], lse[r]);
    }
  }

  __device__ __forceinline__ void write(int r, int row, float keep, float lse) {
    if (lane % 4 == 0 && d.lse) d.lse[(int64_t{batch()} * d.heads + kv_head() * (d.heads / d.kv_heads)) * d.q_len + row] = lse;
    T* to = decoding::row_of<T>(d, d.out, batch(), kv_head(), row);
    each(r, [&](int column, float x, float y) { *reinterpret_cast<uint32_t*>(to + column) = pack<T>(keep == 0 ? 0 : x * keep, keep == 0 ? 0 : y * keep); });
  }

  __device__ __forceinline__ void write_part(int r, int row, float keep, float lse) {
    const int64_t at = ((int64_t{blockIdx.x} * d.batch + batch()) * d.kv_heads + kv_head()) * rows() + row;
    if (lane % 4 == 0) d.part_lse[at] = lse;
    float* to = d.part_out + at * d.head_dim;
    each(r, [&](int column, float x, float y) { *reinterpret_cast<float2*>(to + column) = float2{keep == 0 ? 0 : x * keep, keep == 0 ? 0 : y * keep}; });
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
  auto& shared = *reinterpret_cast<Shared<S>*>((reinterpret_cast<uintptr_t>(raw) + 1023) / 1024 * 1024);
  auto& span = *reinterpret_cast<Span<S::kKeys>*>(shared.out);  // read rarely: registers are for the products
  auto& used = *reinterpret_cast<uint32_t*>(shared.out + sizeof(span));
  const int batch = blockIdx.z, kv_head = blockIdx.y / tiles, tile = tiles - 1 - blockIdx.y % tiles;  // those with most keys first
  const uint32_t words = used_words(d, &used, batch, S::kQueries * tile, S::kQueries, S::kThreads);
  if (threadIdx.x == 0) {
    init_barriers(shared);
    new (shared.out) Span<S::kKeys>(d, length_of(d, batch), words, batch, blockIdx.x, S::kQueries * tile, S::kQueries);
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_fewer<40>();
    if (threadIdx.x == 0) copy_cache<S>(span, maps, shared, kv_head, batch);
  } else {
    registers_more<232>();
    Decoder<S, T> decoder(span, shared, d.scale * 1.4426950408889634f);
    decoder.run();
  }
}

}  // namespace sparse_attention::sm90
