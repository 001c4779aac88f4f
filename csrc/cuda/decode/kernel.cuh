// Decoding with warp matrix products: a block walks over its share of the key tiles, some stages ahead of itself, and merges what its
// warps and the other blocks of its cluster have found.
#pragma once
#include "merge.cuh"
#include "products.cuh"

namespace sparse_attention::decoding {

template <class S>
struct Worker {
  using T = typename S::T;
  using P = Products<S>;

  const Decode& d;
  Shared<S>& shared;
  Work<S> work;
  const P products;
  const int lane, key_warp, my_row;  // the row of the group that this thread's accumulators begin with
  const float scale_log2;
  typename P::Queries held;
  float out[S::kDim / 8][4], most[2], sum[2];  // most: of the scores, as they are

  __device__ Worker(const Decode& d, Shared<S>& shared, int64_t length, uint32_t used, int kv_head, int batch, int first_row, int split)
      : d(d), shared(shared), work(d, length, used, kv_head, batch, first_row, split), lane(threadIdx.x % 32), key_warp(threadIdx.x / 32 / S::kRowWarps),
        my_row(first_row + products.row + lane / 4), scale_log2(d.scale * 1.4426950408889634f) {}

  // alive: whether the node with this thread's number is one.
  __device__ __forceinline__ void run(bool alive) {
    const int begin = work.span.next(work.span.first);
    int ahead = begin;
#pragma unroll 1
    for (int stage = 0; stage < S::kStages - 1; ++stage) bring(ahead, stage);
    clear();
    if (d.ancestors) work.find_holes(shared.alive, alive);
    int query[2], depth[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) query[r] = work.query_of(my_row + 8 * r, shared.alive), depth[r] = query[r] < 0 ? 0 : work.span.depth(query[r]);
    for (int visit = begin, stage = 0; visit < work.span.last; visit = work.span.next(visit + 1)) {
      const int tile = work.span.tile(visit), base = tile * S::kKeys + products.key - work.span.prefix;
      const bool full = work.span.full(tile);
      uint64_t seen[2] = {0, 0};
      if (!full) look(seen, query, depth, base);
      copies_wait<S::kStages - 2>();
      if (work.holes && !full) work.fill_holes(shared.stage[stage], tile, shared.alive);
      __syncthreads();
      if (S::kHold && visit == begin) hold();
      bring(ahead, stage == 0 ? S::kStages - 1 : stage - 1);
      float s[S::kMine / 8][4] = {};
      products.score(s, held, shared.q, shared.stage[stage]);
      if (!full) hide(s, seen);
      soften(s);
      products.weigh(out, s, shared.stage[stage]);
      if (++stage == S::kStages) stage = 0;
    }
    copies_wait<0>();
    __syncthreads();
    allow_next();
    finish(query);
  }

  // Both rows' words are on their way at once; one piece of code for both, since it comes from far away in a first call.
  __device__ __forceinline__ void look(uint64_t (&seen)[2], const int (&query)[2], const int (&depth)[2], int base) const {
    const Words words[2] = {work.span.words_of(query[0], base), work.span.words_of(query[1], base)};
#pragma unroll 1
    for (int r = 0; r < 2; ++r) {
      const int mine = r ? query[1] : query[0];
      const uint64_t bits = mine < 0 ? 0 : work.span.seen(mine, r ? depth[1] : depth[0], base, r ? words[1] : words[0]);
      (r ? seen[1] : seen[0]) = bits;
    }
  }

  __device__ __forceinline__ void bring(int& ahead, int stage) {
    if (ahead < work.span.last) {
      work.copy_tile(shared.stage[stage], work.span.tile(ahead));
      ahead = work.span.next(ahead + 1);
    }
    copies_commit();
  }

  // Queries leave the memory of the stage that is filled next.
  __device__ __forceinline__ void hold() {
#pragma unroll
    for (int x = 0; x < P::kSteps; ++x) products.load(held[S::kHold ? x : 0], shared.queries(), x);
    __syncthreads();
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < 2; ++r) most[r] = -INFINITY, sum[r] = 0;
#pragma unroll
    for (int j = 0; j < S::kDim / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[j][i] = 0;
  }

  __device__ __forceinline__ void hide(float (&s)[S::kMine / 8][4], const uint64_t (&seen)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint64_t bits = seen[r] >> (lane % 4 * 2);
      const uint32_t half[2] = {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
#pragma unroll
      for (int j = 0; j < S::kMine / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = s[j][2 * r + e];
          score = half[j / 4] >> (j % 4 * 8 + e) & 1 ? score : -INFINITY;
        }
    }
  }

  // Scores become weights in place; the base of a row follows its largest score.
  __device__ __forceinline__ void soften(float (&s)[S::kMine / 8][4]) {
    float top[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = most[r];
#pragma unroll
      for (int j = 0; j < S::kMine / 8; ++j) top[r] = fmaxf(top[r], fmaxf(s[j][2 * r], s[j][2 * r + 1]));
      top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 1));
      top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 2));
    }
    if (__any_sync(~0u, top[0] != most[0] || top[1] != most[1])) move(top);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float base = most[r] == -INFINITY ? 0.0f : most[r] * scale_log2;
      float added = 0;
#pragma unroll
      for (int j = 0; j < S::kMine / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[j][2 * r + e];
          x = sm80::exp2_fast(fmaf(x, scale_log2, -base));
          added += x;
        }
      sum[r] += added;
    }
  }

  __device__ __forceinline__ void move(const float (&top)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float worth = top[r] == -INFINITY ? 0.0f : sm80::exp2_fast((most[r] - top[r]) * scale_log2);
      most[r] = top[r];
      sum[r] *= worth;
#pragma unroll
      for (int j = 0; j < S::kDim / 8; ++j) out[j][2 * r] *= worth, out[j][2 * r + 1] *= worth;
    }
  }

  // A row without a query, and one that saw nothing, is 0.
  __device__ __forceinline__ void finish(const int (&query)[2]) {
    float* part = shared.part(key_warp);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
      sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
      const bool nothing = query[r] < 0 || sum[r] == 0;
      const int row = my_row + 8 * r - work.first_row;
      if (lane % 4 == 0) shared.ends[key_warp][row] = {nothing ? -INFINITY : most[r] * scale_log2, nothing ? 0 : sum[r]};
#pragma unroll
      for (int j = 0; j < S::kDim / 8; ++j)
        *reinterpret_cast<float2*>(part + row * S::kPartPitch + 8 * j + lane % 4 * 2) =
            nothing ? float2{0, 0} : float2{out[j][2 * r], out[j][2 * r + 1]};
    }
    __syncthreads();
    if (S::kKeyWarps > 1 || d.cluster == 1) merge_warps(work, shared);
    if (d.cluster > 1) merge_cluster(work, shared);
  }
};

// grid: (splits, kv_heads * row tiles, batch); tiles with most keys first.
template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kThreads <= 128 && S::kDim <= 128 ? 2 : 1) decode(const __grid_constant__ Decode d, int tiles) {
  extern __shared__ __align__(128) uint8_t raw[];
  auto& shared = *reinterpret_cast<Shared<S>*>(raw);
  const int kv_head = uint32_t(blockIdx.y) / tiles, tile = tiles - 1 - (blockIdx.y - kv_head * tiles), first_row = tile * S::kRows;
  const int64_t length = length_of(d, blockIdx.z);  // arrives while queries are asked for, as does the node
  const bool alive = is_node(d, blockIdx.z, threadIdx.x);
  copy_queries<S>(d, shared.queries(), blockIdx.z, kv_head, first_row);
  const uint32_t used = used_words(d, &shared.used, blockIdx.z, first_row, S::kRows, S::kThreads);
  Worker<S>(d, shared, length, used, kv_head, blockIdx.z, first_row, blockIdx.x).run(alive);
}

}  // namespace sparse_attention::decoding
