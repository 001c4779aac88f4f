// Forward over a layout's tiles on Hopper: one warp copies tiles in with the tensor copy engine, two warpgroups of 64 queries
// each multiply and keep the softmax. A block takes query tiles of 128 from a list until none is left.
#pragma once
#include "../walk.cuh"
#include "ptx.h"

namespace sparse_attention::sm90 {

// Maps of (column, residue, step, head, batch). Sequences of stride d have floor or ceil(N / d) steps: one map for each kind,
// so that nothing past the end of a tensor is read or written.
struct Maps {
  CUtensorMap q[2], k[2], v[2], out[2];
};

struct Params {
  Tables tables;
  float* partial;  // [batch, heads, q_len, head_dim], the output so far where parts merge
  float* lse;      // [batch, heads, q_len]; may be null where parts do not merge
  int32_t heads, group, q_len, head_dim;
  float scale_log2;
};

__host__ __device__ constexpr bool reads_partial(Merge m) { return m == kMiddlePart || m == kLastPart; }
__host__ __device__ constexpr bool writes_partial(Merge m) { return m == kFirstPart || m == kMiddlePart; }

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
  int32_t item;              // the work in `q`; -1 when there is none left
  int32_t has_tiles;
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

// The queries of one item of work, then its key tiles one after the other.
template <class S>
__device__ __forceinline__ void copy_tiles(
    const Params& p, const Maps& maps, Shared<S>& shared, const Work& w, int batch, Ring<S::kStages>& ring) {
  Walk walk(p.tables, w);
  shared.has_tiles = !walk.empty();
  barrier_expect(&shared.q_full, S::kBlocks * S::kQueryBlock);
#pragma unroll
  for (int b = 0; b < S::kBlocks; ++b)
    tensor_load(shared.q + b * S::kQueryBlock, &maps.q[w.q_long], &shared.q_full, 64 * b, w.q_residue,
                w.q_step + S::kQueries * w.tile, w.head, batch);
  const CUtensorMap *k_map = &maps.k[w.k_long], *v_map = &maps.v[w.k_long];
  const int kv_head = w.head / p.group;
  if (walk.empty()) return;
  do {
    walk.step();
    const int step = w.k_step + S::kKeys * walk.tile, stage = ring.stage;
    barrier_wait(&shared.k_empty[stage], ring.phase ^ 1);
    shared.mask[stage] = walk.mark;
    barrier_expect(&shared.k_full[stage], S::kBlocks * S::kKeyBlock);
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b)
      tensor_load(shared.k[stage] + b * S::kKeyBlock, k_map, &shared.k_full[stage], 64 * b, w.k_residue, step, kv_head, batch);
    barrier_wait(&shared.v_empty[stage], ring.phase ^ 1);
    barrier_expect(&shared.v_full[stage], S::kBlocks * S::kKeyBlock);
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b)
      tensor_load(shared.v[stage] + b * S::kKeyBlock, v_map, &shared.v_full[stage], 64 * b, w.k_residue, step, kv_head, batch);
    ring.next();
  } while (!(walk.mark & kLast));
}

template <class S>
__device__ __forceinline__ void produce(const Params& p, const Maps& maps, Shared<S>& shared) {
  Ring<S::kStages> ring;
  uint32_t q_phase = 0;
  for (Share share; share.next(p.tables); q_phase ^= 1) {
    barrier_wait(&shared.q_empty, q_phase ^ 1);
    shared.item = share.batch * p.tables.n_work + share.n;
    copy_tiles<S>(p, maps, shared, p.tables.work[share.n], share.batch, ring);
  }
  barrier_wait(&shared.q_empty, q_phase ^ 1);
  shared.item = -1;
  barrier_arrive(&shared.q_full);
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t both;
  if constexpr (IsHalf<T>::value) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// A warpgroup's 64 queries: accumulator i of a product of N columns is row 8 * (i / 2 % 2) + lane / 4 of the warp's 16, column
// 8 * (i / 4) + lane % 4 * 2 + i % 2.
template <class S, typename T, Merge kMerge, bool kBury>
struct Consumer {
  static constexpr int kScores = S::kKeys / 2, kOut = 64;  // accumulators a thread; the output in chunks of 128 columns or 64
  static constexpr int kWide = S::kDim % 128 == 0 ? 128 : 64, kChunks = S::kDim / kWide, kChunk = kWide / 2;

  const Params& p;
  const Maps& maps;
  Shared<S>& shared;
  const int group, thread, warp, lane;  // group: 0 or 1
  float out[kChunks][kChunk];
  float most[2], sum[2];

  __device__ Consumer(const Params& p, const Maps& maps, Shared<S>& shared)
      : p(p), maps(maps), shared(shared), group(threadIdx.x / 128 - 1), thread(threadIdx.x % 128), warp(thread / 32), lane(thread % 32) {}

  // The queries' memory may be filled anew once both warpgroups are done with it: after the last scores, or after the output.
  static constexpr bool kKeepsQueries = S::kShare && !writes_partial(kMerge);
  __device__ __forceinline__ void release() {
    if (thread == 0) barrier_arrive(&shared.q_empty);
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
        product_registers<T>(out[c], weights[x], descriptor(v + c * (kWide / 64) * S::kKeyBlock + 2048 * x, S::kKeyBlock));
    products_commit();
  }

  __device__ __forceinline__ void hide(float (&s)[kScores], int mask) {
    constexpr int kWords = S::kKeys / 64;
    const uint64_t* words = p.tables.masks + (int64_t{mask} * S::kQueries + group * 64 + warp * 16 + lane / 4) * kWords;
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const uint64_t bits = words[r * 8 * kWords + w] >> (lane % 4 * 2);
        const uint32_t half[2] = {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
#pragma unroll
        for (int c = 0; c < 8; ++c)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& score = s[32 * w + 4 * c + 2 * r + e];
            score = half[c / 4] >> (c % 4 * 8 + e) & 1 ? score : -INFINITY;
          }
      }
  }

  // Values that no query sees become 0: their weight is 0, but they may be NaN.
  __device__ __forceinline__ void bury(int mask, int stage) {
    constexpr int kWords = S::kKeys / 64;
    for (int key = thread; key < S::kKeys; key += 128)
      if (p.tables.dead[int64_t{mask} * kWords + key / 64] >> (key % 64) & 1)
#pragma unroll
        for (int b = 0; b < S::kBlocks; ++b)
#pragma unroll
          for (int x = 0; x < 8; ++x) reinterpret_cast<uint4*>(shared.v[stage] + b * S::kKeyBlock + key * 128)[x] = uint4{0, 0, 0, 0};
    fence_async();
    named_sync<128>(4 + group);
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
      const float base = top == -INFINITY ? 0.0f : top * p.scale_log2;
      worth[r] = exp2_fast(most[r] * p.scale_log2 - base);
      most[r] = top;
      float added = 0;
#pragma unroll
      for (int i = 0; i < kScores; i += 4)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[i + 2 * r + e];
          x = exp2_fast(fmaf(x, p.scale_log2, -base));
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

  __device__ void run() {
    Ring<S::kStages> k_ring, v_ring;
    uint32_t q_phase = 0;
    if (group == 1) your_turn();
    for (;; q_phase ^= 1) {
      barrier_wait(&shared.q_full, q_phase);
      const int item = shared.item;
      if (item < 0) break;
      const bool has_tiles = shared.has_tiles;
#pragma unroll
      for (int r = 0; r < 2; ++r) most[r] = -INFINITY, sum[r] = 0;
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int i = 0; i < kChunk; ++i) out[c][i] = 0;
      if (has_tiles) attend(k_ring, v_ring);
      else named_sync<128>(4 + group);  // all have read what `release` gives away
      if (!has_tiles && !kKeepsQueries) release();
      finish(item);
    }
    if (group == 0) my_turn();  // leaves no arrival behind
  }

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
    if (thread == 0) barrier_arrive(&shared.k_empty[k_ring.stage]);
    if (last && !kKeepsQueries) release();
    k_ring.next();
    if ((mark & kFull) != kFull) hide(s, mark & kFull);
    soften(s, worth);
    convert(weights, s);
    while (!last) {
      const int earlier = mark;
      barrier_wait(&shared.k_full[k_ring.stage], k_ring.phase);
      mark = shared.mask[k_ring.stage];
      last = mark & kLast;
      if (kBury && earlier & kDead) {
        barrier_wait(&shared.v_full[v_ring.stage], v_ring.phase);
        bury(earlier & kFull, v_ring.stage);
      }
      my_turn();
      score(s, k_ring.stage);
      barrier_wait(&shared.v_full[v_ring.stage], v_ring.phase);
      weigh(weights, v_ring.stage);
      your_turn();
      products_wait<1>();
      pin(s);
      if (thread == 0) barrier_arrive(&shared.k_empty[k_ring.stage]);
      if (last && !kKeepsQueries) release();
      k_ring.next();
      if ((mark & kFull) != kFull) hide(s, mark & kFull);
      soften(s, worth);
      products_wait<0>();
#pragma unroll
      for (int c = 0; c < kChunks; ++c) pin(out[c]);
      if (thread == 0) barrier_arrive(&shared.v_empty[v_ring.stage]);
      v_ring.next();
      convert(weights, s);
      rescale(worth);
    }
    barrier_wait(&shared.v_full[v_ring.stage], v_ring.phase);
    if (kBury && mark & kDead) bury(mark & kFull, v_ring.stage);
    weigh(weights, v_ring.stage);
    products_wait<0>();
#pragma unroll
    for (int c = 0; c < kChunks; ++c) pin(out[c]);
    if (thread == 0) barrier_arrive(&shared.v_empty[v_ring.stage]);
    v_ring.next();
  }

  // Divide by the sum, merge with an earlier part, write.
  __device__ __forceinline__ void finish(int item) {
    const int batch = item / p.tables.n_work;
    const Work w = p.tables.work[item - batch * p.tables.n_work];
    const int first = S::kQueries * w.tile + group * 64 + warp * 16 + lane / 4;  // of the view's rows
    float keep[2], earlier[2] = {0, 0};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
      sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
      const bool nothing = sum[r] == 0;
      keep[r] = nothing ? 0 : 1 / sum[r];
      float lse = nothing ? -INFINITY : (most[r] * p.scale_log2 + __log2f(sum[r])) * 0.6931471805599453f;
      const int step = first + 8 * r;
      if (step < w.q_count && p.lse) {
        float* place = p.lse + (int64_t{batch} * p.heads + w.head) * p.q_len + w.q_first + int64_t{w.stride} * step;
        if constexpr (reads_partial(kMerge)) {
          const float before = *place, top = fmaxf(lse, before);
          if (top != -INFINITY) {
            const float mine = __expf(lse - top), theirs = __expf(before - top), all = mine + theirs;
            keep[r] *= mine / all;
            earlier[r] = theirs / all;
            lse = top + __logf(all);
          }
        }
        __syncwarp(0xFu << (lane / 4 * 4));  // all four have read what one of them writes
        if (lane % 4 == 0) *place = lse;
      }
    }
    const int64_t base = (int64_t{batch} * p.heads + w.head) * p.q_len + w.q_first;
    float* rows[2];
#pragma unroll
    for (int r = 0; r < 2; ++r)
      rows[r] = first + 8 * r < w.q_count ? p.partial + (base + int64_t{w.stride} * (first + 8 * r)) * p.head_dim : nullptr;
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) merge(c, piece, rows, keep, earlier);
    if constexpr (!writes_partial(kMerge)) store(w, batch);
  }

  static constexpr int kPieces = S::kDim > 128 ? 4 : 2;  // as many as registers ask for

  // Scales a piece of a chunk of the output, adds what earlier parts left, writes it for later ones.
  __device__ __forceinline__ void merge(int c, int piece, float* const (&rows)[2], const float (&keep)[2], const float (&earlier)[2]) {
    constexpr int kPairs = kChunk / 4 / kPieces;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const auto column = [&](int i) { return c * kWide + 8 * (piece * kPairs + i) + lane % 4 * 2; };
      float2 before[kPairs];
      if constexpr (reads_partial(kMerge))
#pragma unroll
        for (int i = 0; i < kPairs; ++i)
          before[i] = rows[r] && column(i) < p.head_dim ? __ldcs(reinterpret_cast<const float2*>(rows[r] + column(i))) : float2{0, 0};
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const int at = 4 * (piece * kPairs + i) + 2 * r;
        float &x = out[c][at], &y = out[c][at + 1];
        x *= keep[r], y *= keep[r];
        if constexpr (reads_partial(kMerge)) x = fmaf(before[i].x, earlier[r], x), y = fmaf(before[i].y, earlier[r], y);
        if constexpr (writes_partial(kMerge))
          if (rows[r] && column(i) < p.head_dim) *reinterpret_cast<float2*>(rows[r] + column(i)) = float2{x, y};
      }
    }
  }

  __device__ __forceinline__ void store(const Work& w, int batch) {
    if (thread == 0) store_wait_read();
    named_sync<128>(4 + group);
    uint8_t* const place = S::kShare ? shared.q : shared.out;
    // stmatrix takes four 8 x 8 matrices: columns 16 j to 16 j + 15 of the warp's 16 rows. Rows of 128 bytes, swizzled.
    const int row = warp * 16 + lane % 16;
    uint8_t* mine = place + group * 64 * 128;
#pragma unroll
    for (int j = 0; j < S::kDim / 16; ++j) {
      const float* x = &out[j / (kWide / 16)][j % (kWide / 16) * 8];
      const int chunk = (2 * j + lane / 16) % 8;
      const uint32_t address = shared_address(mine) + j / 4 * S::kQueryBlock + row * 128 + ((chunk ^ (row % 8)) * 16);
      store_matrices(address, pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7]));
    }
    fence_async();
    named_sync<128>(4 + group);
    const int step = S::kQueries * w.tile + group * 64;
    if (thread == 0 && step < w.q_count) {
#pragma unroll
      for (int b = 0; b < S::kBlocks; ++b)
        tensor_store(&maps.out[w.q_long], mine + b * S::kQueryBlock, 64 * b, w.q_residue, w.q_step + step, w.head, batch);
      store_commit();
    }
    if constexpr (kKeepsQueries) {
      if (thread == 0) store_wait_read();
      release();
    }
  }
};

template <class S, typename T, Merge kMerge, bool kBury>
__global__ void __launch_bounds__(S::kThreads, 1) forward(const __grid_constant__ Maps maps, const Params p) {
  extern __shared__ uint8_t raw[];
  auto& shared = *reinterpret_cast<Shared<S>*>((reinterpret_cast<uintptr_t>(raw) + 1023) / 1024 * 1024);
  if (threadIdx.x == 0) {
    barrier_init(&shared.q_full, 1);
    barrier_init(&shared.q_empty, 2);
    for (int s = 0; s < S::kStages; ++s) {
      barrier_init(&shared.k_full[s], 1);
      barrier_init(&shared.v_full[s], 1);
      barrier_init(&shared.k_empty[s], 2);
      barrier_init(&shared.v_empty[s], 2);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_fewer<24>();
    if (threadIdx.x == 0) produce<S>(p, maps, shared);
  } else {
    registers_more<240>();
    Consumer<S, T, kMerge, kBury> consumer(p, maps, shared);
    consumer.run();
  }
}

}  // namespace sparse_attention::sm90
