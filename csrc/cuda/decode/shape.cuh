// A block's shape and shared memory, and the copies that fill it.
#pragma once
#include "ptx.h"
#include "span.cuh"

namespace sparse_attention::decoding {

using sm80::copies_commit, sm80::copies_wait, sm80::copy_16, sm80::shared_address;

// kRowWarps warps of 16 rows each, times kKeyWarps that share the keys of a tile.
template <typename T_, int kDim_, int kRowWarps_, int kKeyWarps_, int kShared = 96 * 1024>
struct Shape {
  using T = T_;
  static constexpr int kDim = kDim_, kRowWarps = kRowWarps_, kKeyWarps = kKeyWarps_;
  static constexpr bool kSingle = sizeof(T) == 4;  // products of TF32, three for one
  static constexpr int kRows = 16 * kRowWarps, kThreads = 32 * kRowWarps * kKeyWarps;
  static constexpr int kRowBytes = kDim * sizeof(T), kUnits = kRowBytes / 16;  // copied 16 bytes at a time
  static constexpr int kPitch = kRowBytes + (kSingle ? 16 : 0);  // bytes of a row in shared memory
  static constexpr int kKeys = kRowBytes <= 256 ? 64 : kRowBytes <= 512 ? 32 : 16, kMine = kKeys / kKeyWarps;  // of a tile; of a warp
  static constexpr bool kHold = kDim <= 128;  // queries stay in registers
  static constexpr int kStage = 2 * kKeys * kPitch, kQueryBytes = kRows * kPitch;
  static constexpr int kFit = (kShared - (kHold ? 0 : kQueryBytes)) / kStage, kStages = kFit < 2 ? 2 : kFit > 6 ? 6 : kFit;
  static constexpr int kCopies = kKeys * kUnits / kThreads;  // of a thread, for the keys of a tile
  static constexpr int kPartPitch = kDim + 8;                // floats of a row's output in shared memory
  static_assert(kKeys * kUnits % kThreads == 0 && kCopies <= 32 && kMine % (kSingle ? 8 : 16) == 0);
  static_assert(!kHold || kQueryBytes <= kStage);
};

template <class S>
struct alignas(128) Shared {
  uint8_t stage[S::kStages][S::kStage];  // keys, then values; at first queries in the last; at the end outputs as floats, over `q` too
  uint8_t q[S::kHold ? 128 : S::kQueryBytes];
  float2 ends[S::kKeyWarps + 1][S::kRows];  // the base of each row's softmax in powers of 2, and its sum; the last: of all warps
  uint32_t used;  // words of a tree, see Span

  __device__ __forceinline__ uint8_t* queries() { return S::kHold ? stage[S::kStages - 1] : q; }
  __device__ __forceinline__ float* part(int warp) { return reinterpret_cast<float*>(stage) + warp * S::kRows * S::kPartPitch; }
  static_assert(S::kKeyWarps * S::kRows * S::kPartPitch * 4 <= S::kStages * S::kStage + sizeof(q));
};

// Where 16 bytes of a row lie: no two rows of eight in the same banks.
template <class S>
__device__ __forceinline__ int place(int row, int unit) {
  return row * S::kPitch + (S::kSingle ? unit : unit ^ row % 8) * 16;
}

// One block's part of a call.
template <class S>
struct Work {
  using T = typename S::T;
  const Decode& d;
  const int kv_head, batch, first_row, rows;  // rows: of the group
  Span<S::kKeys> span;

  __device__ Work(const Decode& d, int kv_head, int batch, int first_row, int split)
      : d(d), kv_head(kv_head), batch(batch), first_row(first_row), rows(d.heads / d.kv_heads * d.q_len), span(d, batch, split, first_row, S::kRows) {}

  // Where a row begins in q or out.
  __device__ __forceinline__ T* row_of(const Strided& x, int row) const {
    const int64_t head = int64_t{kv_head} * (d.heads / d.kv_heads) + row / d.q_len;
    return static_cast<T*>(x.data) + batch * x.batch + head * x.head + row % d.q_len * x.row;
  }

  __device__ __forceinline__ void copy_queries(uint8_t* to) const {
    const uint32_t target = shared_address(to);
    for (int n = threadIdx.x; n < S::kRows * S::kUnits; n += S::kThreads) {
      const int local = n / S::kUnits, unit = n % S::kUnits, row = first_row + local;
      const bool real = row < rows && unit * 16 < d.head_dim * int(sizeof(T));
      copy_16(target + place<S>(local, unit), reinterpret_cast<const uint8_t*>(row_of(d.q, real ? row : 0)) + (real ? unit * 16 : 0), real);
    }
  }

  // Keys and values of a tile; zeros for those that no query may see.
  __device__ __forceinline__ void copy_tile(uint8_t* to, int tile) const {
    const uint32_t target = shared_address(to);
    const int64_t head_k = kv_head * d.k.head, head_v = kv_head * d.v.head;
#pragma unroll
    for (int i = 0; i < S::kCopies; ++i) {
      const int n = threadIdx.x + i * S::kThreads, local = n / S::kUnits, unit = n % S::kUnits, key = tile * S::kKeys + local;
      const bool real = span.kept(key) && unit * 16 < d.head_dim * int(sizeof(T));
      const int64_t page = !real ? 0 : span.table ? span.table[key >> span.page_shift] : batch;
      const int64_t row = !real ? 0 : span.table ? key & (d.page - 1) : key;
      const int column = real ? unit * int(16 / sizeof(T)) : 0;
      const uint32_t at = target + place<S>(local, unit);
      copy_16(at, static_cast<const T*>(d.k.data) + page * d.k.batch + head_k + row * d.k.row + column, real);
      copy_16(at + S::kStage / 2, static_cast<const T*>(d.v.data) + page * d.v.batch + head_v + row * d.v.row + column, real);
    }
  }

  // Of the rows of a tile that this thread copies: those of nodes that are none.
  __device__ __forceinline__ uint32_t orphans(int tile) const {
    uint32_t found = 0;
    if (!span.ancestors || (tile + 1) * S::kKeys <= span.prefix) return 0;
#pragma unroll
    for (int i = 0; i < S::kCopies; ++i)
      found |= uint32_t{span.orphan(tile * S::kKeys + (threadIdx.x + i * S::kThreads) / S::kUnits)} << i;
    return found;
  }

  // Values of those become 0: their weight is 0, but they may be NaN.
  __device__ __forceinline__ void zero_values(uint8_t* stage, uint32_t which) const {
#pragma unroll
    for (int i = 0; i < S::kCopies; ++i) {
      const int n = threadIdx.x + i * S::kThreads;
      if (which >> i & 1) *reinterpret_cast<uint4*>(stage + S::kStage / 2 + place<S>(n / S::kUnits, n % S::kUnits)) = uint4{0, 0, 0, 0};
    }
  }
};

}  // namespace sparse_attention::decoding
