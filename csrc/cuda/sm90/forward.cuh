// Forward over a layout's tiles on Hopper: one warp copies tiles in with the tensor copy engine, two warpgroups of 64 queries
// each multiply and keep the softmax. A block takes query tiles of 128 from a list until none is left.
#pragma once
#include "agenda.cuh"
#include "halves.cuh"

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
  Cuts cuts;
  int32_t heads, group, q_len, head_dim;
  float scale_log2;
};

__host__ __device__ constexpr bool reads_partial(Merge m) { return m == kMiddlePart || m == kLastPart; }
__host__ __device__ constexpr bool writes_partial(Merge m) { return m == kFirstPart || m == kMiddlePart; }

// With the item's number: whether the phase of `q_full` is 1 when it is there, a register less than counting; and Share's `both`.
constexpr int kOdd = 1 << 30, kBoth = 1 << 29;

template <class S>
struct Memory : Shared<S> {
  Agenda agenda;
};

// Copies the key tiles of each item in, one after the other, and its queries behind the first keys: those are on their way before the memory
// of the queries before is free. One thread.
template <class S, class Steps>
__device__ __forceinline__ void produce(const Params& p, const Maps& maps, Shared<S>& shared, Steps steps) {
  Ring<S::kStages> ring;
  const CUtensorMap *k_map = maps.k, *v_map = maps.v;
  int batch = 0, kv_head = 0, residue = 0, begin = 0;
  uint32_t q_phase = 0;
  while (steps.next()) {
    const Work& w = steps.work();
    const bool first = steps.is_first(), some = steps.tile() >= 0;
    const int stage = ring.stage;
    if (first) {
      k_map = &maps.k[w.longs / kLongK], v_map = &maps.v[w.longs / kLongK];
      batch = steps.batch(), kv_head = w.head / p.group, residue = w.k_residue, begin = w.k_step;
    }
    const int at = begin + S::kKeys * steps.tile();
    if (some) {
      barrier_wait(&shared.k_empty[stage], ring.phase ^ 1);
      shared.mask[stage] = steps.mark();
      barrier_expect(&shared.k_full[stage], S::kBlocks * S::kKeyBlock);
#pragma unroll
      for (int b = 0; b < S::kBlocks; ++b)
        tensor_load(shared.k[stage] + b * S::kKeyBlock, k_map, &shared.k_full[stage], 64 * b, residue, at, kv_head, batch);
    }
    if (first) {
      barrier_wait(&shared.q_empty, q_phase ^ 1);
      shared.item = (batch * p.tables.n_work + steps.n()) | (q_phase ? kOdd : 0) | (steps.both() ? kBoth : 0);
      q_phase ^= 1;
      shared.has_tiles = some, shared.cut = steps.cut();
      barrier_expect(&shared.q_full, S::kBlocks * S::kQueryBlock);
#pragma unroll
      for (int b = 0; b < S::kBlocks; ++b)
        tensor_load(shared.q + b * S::kQueryBlock, &maps.q[w.longs & kLongQ], &shared.q_full, 64 * b, w.q_residue, w.q_step + S::kQueries * w.tile, w.head, batch);
    }
    steps.done();
    if (!some) continue;
    barrier_wait(&shared.v_empty[stage], ring.phase ^ 1);
    barrier_expect(&shared.v_full[stage], S::kBlocks * S::kKeyBlock);
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b)
      tensor_load(shared.v[stage] + b * S::kKeyBlock, v_map, &shared.v_full[stage], 64 * b, residue, at, kv_head, batch);
    ring.next();
  }
  barrier_wait(&shared.q_empty, q_phase ^ 1);
  shared.item = -1;
  barrier_arrive(&shared.q_full);
}

// kHalves: under a block mask of 64 rows, so that many tiles are seen by one warpgroup's queries alone.
template <class S, typename T, Merge kMerge, bool kBury, bool kHalves>
struct Consumer : Attend<S, T, kBury, Consumer<S, T, kMerge, kBury, kHalves>> {
  using Base = Attend<S, T, kBury, Consumer>;
  using Base::each, Base::group, Base::lane, Base::out, Base::shared, Base::thread, Base::warp, Base::kChunk, Base::kChunks, Base::kScores, Base::kWide;

  const Params& p;
  const Maps& maps;

  __device__ Consumer(const Params& p, const Maps& maps, Shared<S>& shared) : Base(shared, p.scale_log2), p(p), maps(maps) {}

  static constexpr bool kEachWarp = kHalves;

  // The queries' memory may be filled anew once both warpgroups are done with it: after the last scores, or after the output.
  static constexpr bool kKeepsQueries = S::kShare && !writes_partial(kMerge);
  __device__ __forceinline__ void release() {
    if (this->says()) barrier_arrive(&shared.q_empty);
  }
  __device__ __forceinline__ void scored_last() {
    if constexpr (!kKeepsQueries) release();
  }

  // What this half of the queries sees of a tile: see Tables::marks.
  __device__ __forceinline__ bool sees(int mask, bool& all) const {
    const int count = p.tables.bit_masks, half = mask == kFull ? 0 : mask > 2 * count ? 2 : mask >= count ? 1 : 0;
    all = mask == kFull || (half && mask == half * (count + 1) + count - 1);
    return half != 2 - group;
  }

  __device__ __forceinline__ void hide(float (&s)[kScores], int mask) {
    constexpr int kWords = S::kKeys / 64;
    const uint64_t* words = p.tables.masks + (int64_t{mask} * S::kQueries + group * 64 + warp * 16 + lane / 4) * kWords;
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int w = 0; w < kWords; ++w) this->hide_word(s, r, w, words[r * 8 * kWords + w]);
  }

  // Values that no query sees become 0: their weight is 0, but they may be NaN.
  __device__ __forceinline__ void bury(int mask, int stage) {
    constexpr int kWords = S::kKeys / 64;
    for (int key = thread; key < S::kKeys; key += 128)
      if (p.tables.dead[int64_t{mask} * kWords + key / 64] >> (key % 64) & 1) this->zero_value(key, stage);
    fence_async();
    named_sync<128>(4 + group);
  }

  __device__ void run() {
    Ring<S::kStages> k_ring, v_ring;
    if (group == 1) this->your_turn();
    for (uint32_t q_phase = 0;;) {
      barrier_wait(&shared.q_full, q_phase);
      const int item = shared.item;
      if (item < 0) break;
      const bool has_tiles = shared.has_tiles;
      const int cut = kHalves ? shared.cut : -1;
      this->begin();
      if (!has_tiles) {
        named_sync<128>(4 + group);  // all have read what `release` gives away
        scored_last();
      } else if (kHalves && !(item & kBoth)) {
        Half<S, T, kBury, Consumer>(*this, k_ring, v_ring).run();
      } else {
        this->attend(k_ring, v_ring);  // turns go on where the last such item left them
      }
      finish(item & ~(kOdd | kBoth), cut);
      q_phase = item & kOdd ? 0 : 1;
    }
    if (group == 0) this->my_turn();  // leaves no arrival behind
  }

  // Divide by the sum, merge with an earlier part, write.
  __device__ __forceinline__ void finish(int item, int cut) {
    const int batch = item / p.tables.n_work;
    const Work w = p.tables.work[item - batch * p.tables.n_work];
    const int first = S::kQueries * w.tile + group * 64 + warp * 16 + lane / 4;  // of the view's rows
    float keep[2], lse[2], earlier[2] = {0, 0};
    this->close(keep, lse);
    if (kHalves && cut >= 0 && !join(batch, cut, keep, lse)) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int step = first + 8 * r;
      if (step < w.q_count && p.lse) {
        float* place = p.lse + (int64_t{batch} * p.heads + w.head) * p.q_len + w.q_first + int64_t{w.stride} * step;
        if constexpr (reads_partial(kMerge)) {
          const float before = *place, top = fmaxf(lse[r], before);
          if (top != -INFINITY) {
            const float mine = __expf(lse[r] - top), theirs = __expf(before - top), all = mine + theirs;
            keep[r] *= mine / all;
            earlier[r] = theirs / all;
            lse[r] = top + __logf(all);
          }
        }
        __syncwarp(0xFu << (lane / 4 * 4));  // all four have read what one of them writes
        if (lane % 4 == 0) *place = lse[r];
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

  // Leaves this part's output; true for the last part of the item, whose `out`, `keep` and `lse` are then all parts'.
  __device__ __forceinline__ bool join(int batch, int cut, float (&keep)[2], float (&lse)[2]) {
    const Cuts& cuts = p.cuts;
    const int parts = parts_of(cut);
    const int64_t base = int64_t{batch} * cuts.slots + slot_of(cut);
    const int row = group * 64 + warp * 16 + lane / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t mine = (base + part_of(cut)) * S::kQueries + row + 8 * r;
      if (lane % 4 == 0) cuts.lse[mine] = lse[r];
      each(r, [&](int column, float& x, float& y) {
        if (column < p.head_dim) *reinterpret_cast<float2*>(cuts.out + mine * p.head_dim + column) = {x * keep[r], y * keep[r]};
      });
    }
    __threadfence();
    named_sync<128>(4 + group);
    if (thread == 0) shared.arrived[group] = atomicAdd(&cuts.arrived[2 * base + group], 1u);
    named_sync<128>(4 + group);
    if (shared.arrived[group] != parts - 1) return false;
    __threadfence();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t of_row = base * S::kQueries + row + 8 * r;
      float top = -INFINITY, sum = 0;
      for (int n = 0; n < parts; ++n) top = fmaxf(top, __ldcg(cuts.lse + of_row + n * S::kQueries));
      each(r, [&](int, float& x, float& y) { x = y = 0; });
      for (int n = 0; n < parts; ++n) {
        const int64_t theirs = of_row + n * S::kQueries;
        const float lse_of_part = __ldcg(cuts.lse + theirs), worth = lse_of_part == -INFINITY ? 0 : __expf(lse_of_part - top);  // NaN stays
        sum += worth;
        each(r, [&](int column, float& x, float& y) {
          if (column >= p.head_dim) return;
          const float2 part = __ldcg(reinterpret_cast<const float2*>(cuts.out + theirs * p.head_dim + column));
          x = fmaf(worth, part.x, x), y = fmaf(worth, part.y, y);
        });
      }
      keep[r] = sum == 0 ? 0 : 1 / sum;
      lse[r] = sum == 0 ? -INFINITY : top + __logf(sum);
    }
    return true;
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
        tensor_store(&maps.out[w.longs & kLongQ], mine + b * S::kQueryBlock, 64 * b, w.q_residue, w.q_step + step, w.head, batch);
      store_commit();
    }
    if constexpr (kKeepsQueries) {
      if (thread == 0) store_wait_read();
      release();
    }
  }
};

// Registers of a thread that copies or looks for tiles; the two warpgroups that compute share the rest of 3 times 168.
template <class S, bool kHalves>
constexpr int kCopying = kHalves ? 56 : S::kDim > 192 ? 24 : 40;

template <class S, typename T, Merge kMerge, bool kBury, bool kHalves>
__global__ void __launch_bounds__(S::kThreads, 1) forward(const __grid_constant__ Maps maps, const Params p) {
  extern __shared__ uint8_t raw[];
  auto& shared = *reinterpret_cast<Memory<S>*>((reinterpret_cast<uintptr_t>(raw) + 1023) / 1024 * 1024);
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {maps.q, maps.k, maps.v, maps.out}) map_prefetch(map);
    if (kHalves) shared.agenda.init();
    init_barriers(shared, 1, kHalves ? kWarpsThatSay : 2);
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_fewer<kCopying<S, kHalves>>();
    if constexpr (kHalves) {
      if (threadIdx.x == 0) produce<S>(p, maps, shared, Read(shared.agenda));
      else if (threadIdx.x / 32 == 1) Write(shared.agenda, p.tables).run();
    } else {
      if (threadIdx.x == 0) produce<S>(p, maps, shared, Found(p.tables));
    }
  } else {
    registers_more<(504 - kCopying<S, kHalves>) / 2>();
    Consumer<S, T, kMerge, kBury, kHalves> consumer(p, maps, shared);
    consumer.run();
  }
}

}  // namespace sparse_attention::sm90
