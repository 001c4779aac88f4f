// A block's shape and shared memory, and the copies that fill it.
#pragma once
#include "ptx.h"
#include "span.cuh"

namespace sparse_attention::decoding {

using sm80::copies_commit, sm80::copies_wait, sm80::copy_16, sm80::shared_address;

// kRowWarps warps of 16 rows each, times kKeyWarps that share the keys of a tile. kOnce: no other block reads its keys.
template <typename T_, int kDim_, int kRowWarps_, int kKeyWarps_, bool kOnce_ = false>
struct Shape {
  using T = T_;
  static constexpr int kDim = kDim_, kRowWarps = kRowWarps_, kKeyWarps = kKeyWarps_;
  static constexpr bool kOnce = kOnce_;
  static constexpr bool kSingle = sizeof(T) == 4;  // products of TF32, three for one
  static constexpr int kRows = 16 * kRowWarps, kThreads = 32 * kRowWarps * kKeyWarps;
  static constexpr int kRowBytes = kDim * sizeof(T), kUnits = kRowBytes / 16;  // copied 16 bytes at a time
  static constexpr int kPitch = kRowBytes + (kSingle ? 16 : 0);  // bytes of a row in shared memory
  static constexpr int kKeys = kRowBytes <= 256 ? 64 : kRowBytes <= 512 ? 32 : 16, kMine = kKeys / kKeyWarps;  // of a tile; of a warp
  static constexpr bool kHold = kDim <= 128;  // queries stay in registers
  static constexpr int kStage = 2 * kKeys * kPitch, kQueryBytes = kRows * kPitch;
  static constexpr int kFit = (96 * 1024 - (kHold ? 0 : kQueryBytes)) / kStage, kStages = kFit < 2 ? 2 : kFit > 6 ? 6 : kFit;
  static constexpr int kCopies = kKeys * kUnits / kThreads;  // of a thread, for the keys of a tile
  static constexpr int kPartPitch = kDim + 8;                // floats of a row's output in shared memory
  static_assert(kKeys * kUnits % kThreads == 0 && kMine % (kSingle ? 8 : 16) == 0);
  static_assert(!kHold || kQueryBytes <= kStage);
};

template <class S>
struct alignas(128) Shared {
  uint8_t stage[S::kStages][S::kStage];  // keys, then values; at first queries in the last; at the end outputs as floats, over `q` too
  uint8_t q[S::kHold ? 128 : S::kQueryBytes];
  float2 ends[S::kKeyWarps + 1][S::kRows];  // the base of each row's softmax in powers of 2, and its sum; the last: of all warps
  uint32_t used, alive[32];  // words of a tree, see Span; nodes that there are

  __device__ __forceinline__ uint8_t* queries() { return S::kHold ? stage[S::kStages - 1] : q; }
  __device__ __forceinline__ float* part(int warp) { return reinterpret_cast<float*>(stage) + warp * S::kRows * S::kPartPitch; }
  static_assert(S::kKeyWarps * S::kRows * S::kPartPitch * 4 <= S::kStages * S::kStage + sizeof(q));
};

// Where 16 bytes of a row lie: no two rows of eight in the same banks.
template <class S>
__device__ __forceinline__ int place(int row, int unit) {
  return row * S::kPitch + (S::kSingle ? unit : unit ^ row % 8) * 16;
}

// A thread copies one column of 16 bytes of some rows: first(), first() + kStep and so on.
template <class S>
struct Mine {
  static constexpr int kStep = S::kThreads / S::kUnits;
  static_assert(S::kThreads % S::kUnits == 0 && S::kRows % kStep == 0);
  __device__ __forceinline__ static int unit() { return threadIdx.x % S::kUnits; }
  __device__ __forceinline__ static int first() { return threadIdx.x / S::kUnits; }
};

// Where a row of the group begins in q or out.
template <typename T>
__device__ __forceinline__ T* row_of(const Decode& d, const Strided& x, int batch, int kv_head, int row) {
  const int query = query_of_row(d, row), head = row - query * d.group;
  return static_cast<T*>(x.data) + batch * x.batch + (kv_head * d.group + head) * x.head + query * x.row;
}

// Where a row's log-sum-exp goes in [batch, heads, q_len].
__device__ __forceinline__ int64_t lse_of(const Decode& d, int batch, int kv_head, int row) {
  const int query = query_of_row(d, row), head = row - query * d.group;
  return (int64_t{batch} * d.heads + kv_head * d.group + head) * d.q_len + query;
}

template <class S>
__device__ __forceinline__ void copy_queries(const Decode& d, uint8_t* to, int batch, int kv_head, int first_row) {
  using T = typename S::T;
  const int unit = Mine<S>::unit(), rows = unit * 16 < d.head_dim * int(sizeof(T)) ? d.group * d.q_len - first_row : 0;
  const uint32_t target = shared_address(to);
#pragma unroll 2
  for (int i = 0; i < S::kRows / Mine<S>::kStep; ++i) {
    const int local = Mine<S>::first() + i * Mine<S>::kStep;
    const bool real = local < rows;
    copy_16(target + place<S>(local, unit), row_of<T>(d, d.q, batch, kv_head, real ? first_row + local : 0) + (real ? unit * int(16 / sizeof(T)) : 0), real);
  }
}

// One block's part of a call.
template <class S>
struct Work {
  using T = typename S::T;
  const Decode& d;
  const int kv_head, batch, first_row, rows;  // rows: of the group
  Span<S::kKeys> span;
  bool holes = false;  // whether some node of the tree is none

  __device__ Work(const Decode& d, int64_t length, uint32_t used, int kv_head, int batch, int first_row, int split)
      : d(d), kv_head(kv_head), batch(batch), first_row(first_row), rows(d.group * d.q_len),
        span(d, length, used, batch, split, first_row, S::kRows) {}

  __device__ __forceinline__ static void copy_16_of_cache(uint32_t to, const T* from, bool real) {
    S::kOnce ? copy_16_under(to, from, real, once_policy()) : copy_16(to, from, real);
  }

  // Keys and values of a tile; zeros for those that no query may see.
  __device__ __forceinline__ void copy_tile(uint8_t* to, int tile) const {
    const uint32_t target = shared_address(to);
    const int begin = tile * S::kKeys, first = Mine<S>::first(), unit = Mine<S>::unit(), column = unit * int(16 / sizeof(T));
    const int end = column < d.head_dim ? span.length - begin : 0, low = span.low - begin, sinks = d.sinks - begin;
    if (span.table) return copy_pages(target, begin, end, low, sinks, column);
    const T* k = static_cast<const T*>(d.k.data) + batch * d.k.batch + kv_head * d.k.head + (begin + first) * d.k.row + column;
    const T* v = static_cast<const T*>(d.v.data) + batch * d.v.batch + kv_head * d.v.head + (begin + first) * d.v.row + column;
#pragma unroll
    for (int i = 0; i < S::kCopies; ++i) {
      const int local = first + i * Mine<S>::kStep;
      const bool real = (local < end) & ((local >= low) | (local < sinks));
      const uint32_t at = target + place<S>(local, unit);
      copy_16_of_cache(at, k, real);
      copy_16_of_cache(at + S::kStage / 2, v, real);
      k += Mine<S>::kStep * d.k.row, v += Mine<S>::kStep * d.v.row;
    }
  }

  __device__ __forceinline__ void copy_pages(uint32_t target, int begin, int end, int low, int sinks, int column) const {
    const T* k = static_cast<const T*>(d.k.data) + kv_head * d.k.head + column;
    const T* v = static_cast<const T*>(d.v.data) + kv_head * d.v.head + column;
#pragma unroll 4
    for (int i = 0; i < S::kCopies; ++i) {
      const int local = Mine<S>::first() + i * Mine<S>::kStep;
      bool real = (local < end) & ((local >= low) | (local < sinks));
      const uint32_t page = real ? span.table[(begin + local) >> span.page_shift] : ~0u;
      real = page < uint32_t(d.pages);
      const int64_t at = real ? page : 0, row = (begin + local) & (d.page - 1);
      const uint32_t there = target + place<S>(local, Mine<S>::unit());
      copy_16_of_cache(there, k + at * d.k.batch + row * d.k.row, real);
      copy_16_of_cache(there + S::kStage / 2, v + at * d.v.batch + row * d.v.row, real);
    }
  }

  // Which nodes there are, and whether all of them are; by all threads, with a barrier. mine: whether this thread's first one is.
  __device__ __forceinline__ void find_holes(uint32_t* alive, bool mine) {
    bool found = false;
    for (int node = threadIdx.x; node < (d.q_len + 31) / 32 * 32; node += S::kThreads) {
      const bool here = node < d.q_len && (node == threadIdx.x ? mine : span.node_alive(node));
      const uint32_t bits = __ballot_sync(~0u, here);
      if (node % 32 == 0) alive[node / 32] = bits;
      found |= !here && node < d.q_len;
    }
    holes = __syncthreads_or(found);
  }

  // The query of a row; -1 for a row past the end, a query before the first key, and a node that is none.
  __device__ __forceinline__ int query_of(int row, const uint32_t* alive) const {
    const int query = query_of_row(d, row);
    return row < rows && span.prefix + query >= 0 && (!holes || alive[query / 32] >> (query % 32) & 1) ? query : -1;
  }

  // Values of nodes that are none become 0, by the threads that copied them: their weight is 0, but they may be NaN.
  __device__ __forceinline__ void fill_holes(uint8_t* stage, int tile, const uint32_t* alive) const {
#pragma unroll 1
    for (int i = 0; i < S::kCopies; ++i) {
      const int local = Mine<S>::first() + i * Mine<S>::kStep, node = tile * S::kKeys + local - span.prefix;
      if (node >= 0 && node < d.q_len && !(alive[node / 32] >> (node % 32) & 1))
        *reinterpret_cast<uint4*>(stage + S::kStage / 2 + place<S>(local, Mine<S>::unit())) = uint4{0, 0, 0, 0};
    }
  }
};

}  // namespace sparse_attention::decoding
