// What a warpgroup does with key tiles as they arrive: multiply, soften, weigh. Where tiles come from and where the output goes is left to
// the kernels: forward.cuh over a layout, decoder.cuh over a cache.
#pragma once
#include "../tile.h"
#include "ptx.h"

namespace sparse_attention::sm90 {

template <int kDim_, int kKeys_, int kStages_>
struct Shape {
  static constexpr int kDim = kDim_, kKeys = kKeys_, kStages = kStages_;
  static constexpr int kQueries = kTileQueries, kBlocks = kDim / 64;        // blocks of 64 columns
  static constexpr int kQueryBlock = kQueries * 128, kKeyBlock = kKeys * 128;  // bytes
  static constexpr int kThreads = 384;
  static constexpr bool kShare = kDim > 128;  // the output leaves through the queries' memory
};

template <class S>
struct alignas(1024) Shared {
  alignas(1024) uint8_t q[S::kBlocks * S::kQueryBlock];
  alignas(1024) uint8_t k[S::kStages][S::kBlocks * S::kKeyBlock];
  alignas(1024) uint8_t v[S::kStages][S::kBlocks * S::kKeyBlock];
  alignas(1024) uint8_t out[S::kShare ? 1024 : S::kBlocks * S::kQueryBlock];
  uint64_t q_full, q_empty, k_full[S::kStages], k_empty[S::kStages], v_full[S::kStages], v_empty[S::kStages];
  int32_t mask[S::kStages];  // of the tile in this stage, with kLast for a row's last
  int32_t item;              // the work in `q`, and kOdd and kBoth of forward.cuh; -1 when there is none left
  int32_t has_tiles;
  int32_t cut;         // Piece's, of the item
  int32_t arrived[2];  // how many parts of a cut item were done before, for each warpgroup
};

// A position in a ring of stages.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

// The barriers, before anybody uses them; one thread calls it. bringers: how many arrive when a key tile, and what belongs to it, is there;
// users: when a stage, or the queries' memory, is free.
template <class S>
__device__ __forceinline__ void init_barriers(Shared<S>& shared, int bringers = 1, int users = 2) {
  barrier_init(&shared.q_full, 1);
  barrier_init(&shared.q_empty, users);
  for (int s = 0; s < S::kStages; ++s) {
    barrier_init(&shared.k_full[s], bringers);
    barrier_init(&shared.v_full[s], 1);
    barrier_init(&shared.k_empty[s], users);
    barrier_init(&shared.v_empty[s], users);
  }
  barriers_ready();
}

// A warpgroup's 64 queries: accumulator i of a product of N columns is row 8 * (i / 2 % 2) + lane / 4 of the warp's 16, column
// 8 * (i / 4) + lane % 4 * 2 + i % 2. Self has hide(scores, mask), which gives hidden scores -inf, bury(mask, stage), which makes 0 of
// values that nobody sees, and scored_last(), called when the queries are not needed any more.
template <class S, typename T, bool kBury, class Self>
struct Attend {
  static constexpr int kScores = S::kKeys / 2;  // accumulators a thread; the output in chunks of 128 columns or 64
  static constexpr int kWide = S::kDim % 128 == 0 ? 128 : 64, kChunks = S::kDim / kWide, kChunk = kWide / 2;

  Shared<S>& shared;
  const float scale_log2;
  const int group, thread, warp, lane;  // group: 0 or 1
  float out[kChunks][kChunk];
  float most[2], sum[2];

  __device__ Attend(Shared<S>& shared, float scale_log2)
      : shared(shared), scale_log2(scale_log2), group(threadIdx.x / 128 - 1), thread(threadIdx.x % 128), warp(thread / 32), lane(thread % 32) {}

  __device__ __forceinline__ Self& self() { return static_cast<Self&>(*this); }

  // Who says that a stage is free: a thread of the warpgroup, or, where warps do not meet at each tile, one of each warp.
  static constexpr bool kEachWarp = false;
  __device__ __forceinline__ bool says() const { return Self::kEachWarp ? lane == 0 : thread == 0; }

  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int r = 0; r < 2; ++r) most[r] = -INFINITY, sum[r] = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < kChunk; ++i) out[c][i] = 0;
  }

  // Sums over the four lanes that share a row; then what to multiply outputs with, and the log-sum-exp.
  __device__ __forceinline__ void close(float (&keep)[2], float (&lse)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
      sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
      const bool nothing = sum[r] == 0;
      keep[r] = nothing ? 0 : 1 / sum[r];
      lse[r] = nothing ? -INFINITY : (most[r] * scale_log2 + __log2f(sum[r])) * 0.6931471805599453f;
    }
  }

  // Calls take(column, x, y) for each pair of columns of one of this thread's rows.
  template <class Take>
  __device__ __forceinline__ void each(int r, Take take) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < kChunk / 4; ++i) take(c * kWide + 8 * i + lane % 4 * 2, out[c][4 * i + 2 * r], out[c][4 * i + 2 * r + 1]);
  }

  // Scores of the tile in `stage`: not waited for.
  __device__ __forceinline__ void score(float (&s)[kScores], int stage) {
    const uint32_t q = shared_address(shared.q) + group * 64 * 128, k = shared_address(shared.k[stage]);
    pin(s);
    products_fence();
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b)
#pragma unroll
      for (int x = 0; x < 4; ++x)
        product_shared<T>(s, descriptor(q + b * S::kQueryBlock + 32 * x, 16), descriptor(k + b * S::kKeyBlock + 32 * x, 16), b + x > 0);
    products_commit();
  }

  __device__ __forceinline__ void weigh(const uint32_t (&weights)[S::kKeys / 16][4], int stage) {
    const uint32_t v = shared_address(shared.v[stage]);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) pin(out[c]);
    products_fence();
#pragma unroll
    for (int x = 0; x < S::kKeys / 16; ++x)
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
        product_registers<T>(out[c], weights[x], descriptor(v + c * (kWide / 64) * S::kKeyBlock + 2048 * x, S::kKeyBlock), 1);
    products_commit();
  }

  // Scores of one word of 64 keys whose bit is 0 become -inf, in row r of this thread's two.
  __device__ __forceinline__ void hide_word(float (&s)[kScores], int r, int w, uint64_t bits) {
    bits >>= lane % 4 * 2;
    const uint32_t half[2] = {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
#pragma unroll
    for (int c = 0; c < 8; ++c)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = s[32 * w + 4 * c + 2 * r + e];
        score = half[c / 4] >> (c % 4 * 8 + e) & 1 ? score : -INFINITY;
      }
  }

  // Values of a key become 0: their weight is 0, but they may be NaN.
  __device__ __forceinline__ void zero_value(int key, int stage) {
    uint4* const row = reinterpret_cast<uint4*>(shared.v[stage] + key * 128);
#pragma unroll 1
    for (int x = 0; x < 8 * S::kBlocks; ++x) row[x / 8 * (S::kKeyBlock / 16) + x % 8] = uint4{0, 0, 0, 0};
  }

  // Scores become weights in place; returns what earlier sums and outputs are worth now.
  __device__ __forceinline__ void soften(float (&s)[kScores], float (&worth)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = most[r];
#pragma unroll
      for (int i = 0; i < kScores; i += 4) top = fmaxf(top, fmaxf(s[i + 2 * r], s[i + 2 * r + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float base = top == -INFINITY ? 0.0f : top * scale_log2;
      worth[r] = exp2_fast(most[r] * scale_log2 - base);
      most[r] = top;
      float added = 0;
#pragma unroll
      for (int i = 0; i < kScores; i += 4)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[i + 2 * r + e];
          x = exp2_fast(fmaf(x, scale_log2, -base));
          added += x;
        }
      sum[r] = sum[r] * worth[r] + added;
    }
  }

  __device__ __forceinline__ void rescale(const float (&worth)[2]) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < kChunk; ++i) out[c][i] *= worth[i / 2 % 2];
  }

  __device__ __forceinline__ void convert(uint32_t (&weights)[S::kKeys / 16][4], const float (&s)[kScores]) {
#pragma unroll
    for (int x = 0; x < S::kKeys / 16; ++x)
#pragma unroll
      for (int j = 0; j < 4; ++j) weights[x][j] = pack<T>(s[8 * x + 2 * j], s[8 * x + 2 * j + 1]);
  }

  // The two warpgroups take turns at the tensor cores: one multiplies while the other is at its softmax.
  __device__ __forceinline__ void my_turn() { named_sync<256>(2 + group); }
  __device__ __forceinline__ void your_turn() { named_arrive<256>(2 + (group ^ 1)); }

  __device__ __forceinline__ void attend(Ring<S::kStages>& k_ring, Ring<S::kStages>& v_ring) {
    float s[kScores], worth[2];
    uint32_t weights[S::kKeys / 16][4];
    barrier_wait(&shared.k_full[k_ring.stage], k_ring.phase);
    int mark = shared.mask[k_ring.stage];
    my_turn();
    score(s, k_ring.stage);
    products_wait<0>();
    pin(s);
    your_turn();
    bool last = mark & kLast;
    if (says()) barrier_arrive(&shared.k_empty[k_ring.stage]);
    if (last) self().scored_last();
    k_ring.next();
    if ((mark & kFull) != kFull) self().hide(s, mark & kFull);
    soften(s, worth);
    convert(weights, s);
    while (!last) {
      const int earlier = mark;
      barrier_wait(&shared.k_full[k_ring.stage], k_ring.phase);
      mark = shared.mask[k_ring.stage];
      last = mark & kLast;
      if (kBury && earlier & kDead) {
        barrier_wait(&shared.v_full[v_ring.stage], v_ring.phase);
        self().bury(earlier & kFull, v_ring.stage);
      }
      my_turn();
      score(s, k_ring.stage);
      barrier_wait(&shared.v_full[v_ring.stage], v_ring.phase);
      weigh(weights, v_ring.stage);
      your_turn();
      products_wait<1>();
      pin(s);
      if (says()) barrier_arrive(&shared.k_empty[k_ring.stage]);
      if (last) self().scored_last();
      k_ring.next();
      if ((mark & kFull) != kFull) self().hide(s, mark & kFull);
      soften(s, worth);
      products_wait<0>();
#pragma unroll
      for (int c = 0; c < kChunks; ++c) pin(out[c]);
      if (says()) barrier_arrive(&shared.v_empty[v_ring.stage]);
      v_ring.next();
      convert(weights, s);
      rescale(worth);
    }
    barrier_wait(&shared.v_full[v_ring.stage], v_ring.phase);
    if (kBury && mark & kDead) self().bury(mark & kFull, v_ring.stage);
    weigh(weights, v_ring.stage);
    products_wait<0>();
#pragma unroll
    for (int c = 0; c < kChunks; ++c) pin(out[c]);
    if (says()) barrier_arrive(&shared.v_empty[v_ring.stage]);
    v_ring.next();
  }
};

}  // namespace sparse_attention::sm90
