// Forward over a layout's tiles with warp matrix products (Ampere and later): FlashAttention-2's loop over the steps that a layout
// lists. Keys arrive while the weights of the step before are multiplied, values while the scores are; the operands of a product leave
// shared memory while the one before is computed.
#pragma once
#include <cfloat>

#include "ptx.h"
#include "stretches.cuh"
#include "tiles.cuh"

namespace sparse_attention::sm80 {

__host__ __device__ constexpr bool reads_partial(Merge m) { return m == kMiddlePart || m == kLastPart; }
__host__ __device__ constexpr bool writes_partial(Merge m) { return m == kFirstPart || m == kMiddlePart; }

// A warp's queries. Accumulator i of block m and columns 8 j to 8 j + 7 is row 16 m + 8 (i / 2) + lane / 4, column lane % 4 * 2 + i % 2.
template <class S, typename T>
struct Consumer {
  static constexpr int kBlocks = S::kBlocks;

  const Params& p;
  Shared<S>& shared;
  const int warp, lane;
  float out[kBlocks][S::kDim / 8][4];
  float base[kBlocks][2], sum[kBlocks][2];  // of the softmax, in powers of 2; this lane's part of the weights' sum

  __device__ Consumer(const Params& p, Shared<S>& shared) : p(p), shared(shared), warp(threadIdx.x / 32), lane(threadIdx.x % 32) {}

  __device__ __forceinline__ void run() {
    if (threadIdx.x == 0) {
      Stretches<S::kKeys> first;
      first.next(p, shared.stretch[0], shared.items);
      shared.stretches = first;
    }
    __syncthreads();
    if (shared.stretch[0].item < 0) return;
    copy_queries_and_keys(shared.stretch[0]);
    clear();
    for (uint32_t at = 0;;) {  // twice the step of the stretch, plus which stretch: one register
      const int t = at / 2;
      const Stretch &now = shared.stretch[at % 2], &following = shared.stretch[at % 2 ^ 1];
      // Rows 0 to 15 by columns 0 to 15 of the queries; 16 keys of as many columns. Found before the wait: asking for the thread takes long.
      const int thread = thread_anew(), warp = thread / 32, lane = thread % 32;
      const uint32_t q = shared_address(shared.q) + place<S>(warp * 16 * kBlocks + lane % 16, lane / 16);
      const uint32_t k = shared_address(shared.k) + place<S>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
      arrived();  // keys; all are done with the values of the step before
      float s[kBlocks][S::kKeys / 8][4];
      score(s, q, k, [&] {
        copy_values(now, t);
        if (t == 0 && threadIdx.x == 0) move_on(shared.stretch[at % 2 ^ 1]);
        copies_commit();
      });
      arrived();  // values; all are done with the keys, and the next stretch is known
      const bool ends = t + 1 == now.steps;
      if (!ends) copy_keys(now, t + 1);
      else if (following.item >= 0) copy_queries_and_keys(following);
      if (now.mask != kFull) hide(s, now.mask);
      weigh(s, [&] { soften(s); });
      at += 2;
      if (!ends) continue;
      if (now.last) {
        finish(shared.items[now.item]);
        if (following.item < 0) return;
        clear();
      }
      at = at % 2 ^ 1;
    }
  }

  __device__ __forceinline__ void move_on(Stretch& following) {
    Stretches<S::kKeys> stretches = shared.stretches;
    stretches.next(p, following, shared.items);
    shared.stretches = stretches;
  }

  __device__ __forceinline__ void arrived() {
    copies_wait<0>();
    __syncthreads();
  }

  __device__ __forceinline__ void copy_queries_and_keys(const Stretch& x) {
    const Item& item = shared.items[x.item];
    if (x.first) copy_rows<S, kTileQueries>(shared.q, item.q, item.q_pitch, item.queries, p.head_dim);
    copy_keys(x, 0);
  }

  __device__ __forceinline__ void copy_keys(const Stretch& x, int t) {
    const Item& item = shared.items[x.item];
    const int key = x.key + S::kKeys * t;
    copy_rows<S, S::kKeys>(shared.k, item.k + key * item.k_pitch, item.k_pitch, item.keys - key, p.head_dim);
    copies_commit();
  }

  // Values that no query sees become 0: their weight is 0, but they may be NaN.
  __device__ __forceinline__ void copy_values(const Stretch& x, int t) {
    const Item& item = shared.items[x.item];
    const int key = x.key + S::kKeys * t;
    const uint8_t* from = item.v + key * item.v_pitch;
    if (x.mask != kFull && x.mask != kNothing) {
      // A tile may be several steps.
      const auto bits = [&](const uint64_t* of, int64_t row) {
        return reinterpret_cast<const typename S::Bits*>(of) + (row * p.keys + (t * S::kKeys & (p.keys - 1))) / S::kKeys;
      };
      for (int row = threadIdx.x; row < kTileQueries; row += S::kThreads)
        copy_few<S::kKeys / 8>(&shared.mask[row], bits(p.tables.masks, int64_t{x.mask} * kTileQueries + row));
      if (x.dead) {
        const uint64_t skip = *bits(p.tables.dead, x.mask);
        copy_rows<S, S::kKeys>(shared.v, from, item.v_pitch, item.keys - key, p.head_dim, skip);
        return;
      }
    }
    copy_rows<S, S::kKeys>(shared.v, from, item.v_pitch, item.keys - key, p.head_dim);
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) base[m][r] = -FLT_MAX, sum[m][r] = 0;
#pragma unroll
      for (int j = 0; j < S::kDim / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[m][j][i] = 0;
    }
  }

  // `meanwhile`: what is done while the first operands come.
  template <class F>
  __device__ __forceinline__ void score(float (&s)[kBlocks][S::kKeys / 8][4], uint32_t q, uint32_t k, F&& meanwhile) {
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
#pragma unroll
      for (int j = 0; j < S::kKeys / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][j][i] = 0;
    // The operands of the next product are on their way.
    constexpr int kSteps = S::kDim / 16, kPieces = S::kKeys / 16;
    uint32_t a[2][kBlocks][4], b[2][4];
    const auto ask_a = [&](int x) {
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) load_matrices(a[x % 2][m], (q ^ (x % 4 * 32)) + x / 4 * 128 + m * 16 * S::kPitch);
    };
    const auto ask_b = [&](int n) {
      const int x = n / kPieces, j = n % kPieces;
      load_matrices(b[n % 2], (k ^ (x % 4 * 32)) + x / 4 * 128 + j * 16 * S::kPitch);
    };
    ask_a(0), ask_b(0);
    meanwhile();
#pragma unroll
    for (int x = 0; x < kSteps; ++x)
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        const int n = x * kPieces + j;
        if (n + 1 < kSteps * kPieces) ask_b(n + 1);
        if (j == 0 && x + 1 < kSteps) ask_a(x + 1);
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
          multiply<T>(s[m][2 * j], a[x % 2][m], b[n % 2][0], b[n % 2][1]);
          multiply<T>(s[m][2 * j + 1], a[x % 2][m], b[n % 2][2], b[n % 2][3]);
        }
      }
  }

  __device__ __forceinline__ void hide(float (&s)[kBlocks][S::kKeys / 8][4], int mask) {
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint64_t bits = shared.mask[(warp * kBlocks + m) * 16 + 8 * r + lane / 4] >> (lane % 4 * 2);
        if (mask == kNothing) bits = 0;
        const uint32_t half[2] = {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
#pragma unroll
        for (int j = 0; j < S::kKeys / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& score = s[m][j][2 * r + e];
            score = half[j / 4] >> (j % 4 * 8 + e) & 1 ? score : -INFINITY;
          }
      }
  }

  // Scores become weights in place. The base of a row moves only when a weight would be larger than 2^8: few steps pay for that.
  __device__ __forceinline__ void soften(float (&s)[kBlocks][S::kKeys / 8][4]) {
    float top[kBlocks][2];
    bool moves = false;
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float& x = top[m][r];
        x = fmaxf(s[m][0][2 * r], s[m][0][2 * r + 1]);
#pragma unroll
        for (int j = 1; j < S::kKeys / 8; ++j) x = fmaxf(x, fmaxf(s[m][j][2 * r], s[m][j][2 * r + 1]));
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
        x *= p.scale_log2;
        moves |= x > base[m][r] + 8;
      }
    if (__any_sync(~0u, moves)) move(top);
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float added = 0;
#pragma unroll
        for (int j = 0; j < S::kKeys / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = s[m][j][2 * r + e];
            x = exp2_fast(fmaf(x, p.scale_log2, -base[m][r]));
            added += x;
          }
        sum[m][r] += added;
      }
  }

  __device__ __forceinline__ void move(const float (&top)[kBlocks][2]) {
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float higher = fmaxf(base[m][r], top[m][r]), worth = exp2_fast(base[m][r] - higher);
        base[m][r] = higher;
        sum[m][r] *= worth;
#pragma unroll
        for (int j = 0; j < S::kDim / 8; ++j) out[m][j][2 * r] *= worth, out[m][j][2 * r + 1] *= worth;
      }
  }

  // Adds the values to the sums. `meanwhile`: what is done while the first of them come, and makes weights of s.
  template <class F>
  __device__ __forceinline__ void weigh(float (&s)[kBlocks][S::kKeys / 8][4], F&& meanwhile) {
    // 16 keys by 16 columns of the values, transposed; those of the next product are on their way.
    const uint32_t v = shared_address(shared.v) + place<S>(lane % 16, lane / 16);
    constexpr int kSteps = S::kKeys / 16, kPieces = S::kDim / 16;
    uint32_t a[kBlocks][4], b[2][4];
    const auto ask = [&](int n) {
      const int x = n / kPieces, j = n % kPieces;
      load_matrices_transposed(b[n % 2], (v ^ (j % 4 * 32)) + j / 4 * 128 + x * 16 * S::kPitch);
    };
    ask(0);
    meanwhile();
#pragma unroll
    for (int x = 0; x < kSteps; ++x) {
#pragma unroll
      for (int m = 0; m < kBlocks; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][i] = pack<T>(s[m][2 * x + i / 2][i % 2 * 2], s[m][2 * x + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        const int n = x * kPieces + j;
        if (n + 1 < kSteps * kPieces) ask(n + 1);
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
          multiply<T>(out[m][2 * j], a[m], b[n % 2][0], b[n % 2][1]);
          multiply<T>(out[m][2 * j + 1], a[m], b[n % 2][2], b[n % 2][3]);
        }
      }
    }
  }

  __device__ __forceinline__ void finish(const Item& x) {
    switch (p.merge) {
      case kAlone: return finish_as<kAlone>(x);
      case kFirstPart: return finish_as<kFirstPart>(x);
      case kMiddlePart: return finish_as<kMiddlePart>(x);
      default: return finish_as<kLastPart>(x);
    }
  }

  // Divide by the sum, merge with an earlier part, write.
  template <Merge kMerge>
  __device__ __forceinline__ void finish_as(const Item& x) {
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = (warp * kBlocks + m) * 16 + 8 * r + lane / 4;
        const bool real = row < x.queries;
        const int64_t query = x.lse + int64_t{x.stride} * row;
        float all = sum[m][r];
        all += __shfl_xor_sync(~0u, all, 1);
        all += __shfl_xor_sync(~0u, all, 2);
        float keep = all == 0 ? 0 : 1 / all, earlier = 0;
        float lse = all == 0 ? -INFINITY : (base[m][r] + __log2f(all)) * 0.6931471805599453f;
        if constexpr (reads_partial(kMerge)) {
          const float before = real ? p.lse[query] : -INFINITY, top = fmaxf(lse, before);
          if (top != -INFINITY) {
            const float mine = __expf(lse - top), theirs = __expf(before - top);
            keep *= mine / (mine + theirs);
            earlier = theirs / (mine + theirs);
            lse = top + __logf(mine + theirs);
          }
          __syncwarp();  // all four lanes of a row have read what one of them writes
        }
        if (real && lane % 4 == 0) p.lse[query] = lse;
        float* partial = p.partial + query * p.head_dim;
        uint8_t* target = x.out + row * x.out_pitch;
#pragma unroll
        for (int j = 0; j < S::kDim / 8; j += 4) store<kMerge>(m, r, j, keep, earlier, real, partial, target);
      }
  }

  // Columns 8 j to 8 j + 31 of one row, by its four lanes.
  template <Merge kMerge>
  __device__ __forceinline__ void store(int m, int r, int j, float keep, float earlier, bool real, float* partial, uint8_t* target) {
    uint32_t words[4];
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const int column = 8 * (j + b) + lane % 4 * 2;
      const bool here = real && column < p.head_dim;
      float2 value = {out[m][j + b][2 * r] * keep, out[m][j + b][2 * r + 1] * keep};
      if (reads_partial(kMerge) && here) {
        const float2 before = __ldcs(reinterpret_cast<const float2*>(partial + column));
        value.x = fmaf(before.x, earlier, value.x), value.y = fmaf(before.y, earlier, value.y);
      }
      if (writes_partial(kMerge) && here) *reinterpret_cast<float2*>(partial + column) = value;
      words[b] = pack<T>(value.x, value.y);
    }
    const int columns = j + lane % 4;
    if constexpr (!writes_partial(kMerge)) {
      exchange(words);
      const uint4 all = {words[0], words[1], words[2], words[3]};
      if (real && 8 * columns < p.head_dim) *reinterpret_cast<uint4*>(target + columns * 16) = all;
    }
  }

  // Word b of lane t, of every four, becomes word t of lane b.
  __device__ __forceinline__ void exchange(uint32_t (&words)[4]) {
#pragma unroll
    for (int far = 1; far < 4; far *= 2)
#pragma unroll
      for (int b = 0; b < 4; ++b)
        if (!(b & far)) {
          const bool upper = lane & far;
          const uint32_t got = __shfl_xor_sync(~0u, upper ? words[b] : words[b + far], far);
          (upper ? words[b] : words[b + far]) = got;
        }
  }
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kMostResident = 2;  // with the registers of three, head_dim 64 spills there
#else
constexpr int kMostResident = 3;
#endif

template <class S, typename T>
__global__ void __launch_bounds__(S::kThreads, S::kResident < kMostResident ? S::kResident : kMostResident)
    forward(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) uint8_t raw[];
  Consumer<S, T>(p, *reinterpret_cast<Shared<S>*>(raw)).run();
}

}  // namespace sparse_attention::sm80
