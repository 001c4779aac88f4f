// A block's shared memory in the sm80 tier, and the copies of rows that fill it.
#pragma once
#include "ptx.h"
#include "stretches.cuh"

namespace sparse_attention::sm80 {

// Keys of a step; warps of 16 * kBlocks queries each; blocks that a multiprocessor should hold.
template <int kDim_, int kKeys_, int kBlocks_, int kResident_>
struct Shape {
  static constexpr int kDim = kDim_, kKeys = kKeys_, kBlocks = kBlocks_, kResident = kResident_;
  static constexpr int kThreads = kTileQueries / (16 * kBlocks) * 32;
  static constexpr int kPitch = 2 * kDim;  // bytes of a row in shared memory
  using Bits = std::conditional_t<kKeys == 32, uint32_t, uint64_t>;  // which keys of a step a query sees
  static_assert(kDim % 64 == 0 && sizeof(Bits) * 8 == kKeys);
};

template <class S>
struct alignas(128) Shared {
  uint8_t q[kTileQueries * S::kPitch];
  uint8_t k[S::kKeys * S::kPitch];
  uint8_t v[S::kKeys * S::kPitch];
  typename S::Bits mask[kTileQueries];
  Item items[2];
  Stretch stretch[2];
  Stretches<S::kKeys> stretches;
};

// Where 8 columns of a row lie. Eight rows of the same columns are in eight different quarters of the banks.
template <class S>
__device__ __forceinline__ int place(int row, int columns) {
  return row * S::kPitch + (columns ^ row % 8) * 16;
}

// `real` rows of head_dim columns; zeros for the rest of kRows rows of kDim columns, and for the rows in `skip`.
template <class S, int kRows>
__device__ __forceinline__ void copy_rows(uint8_t* to, const uint8_t* from, int64_t pitch, int real, int head_dim, uint64_t skip = 0) {
  constexpr int kColumns = S::kDim / 8, kTogether = S::kThreads / kColumns / 8 * 8;  // rows copied at a time
  static_assert(kTogether > 0 && kRows % kTogether == 0);
  const int first = threadIdx.x / kColumns, columns = threadIdx.x % kColumns;
  const uint32_t target = shared_address(to) + place<S>(first, columns);
  if (first >= kTogether) return;
  const int mine = 8 * columns < head_dim ? real - first : 0;
  from += first * pitch + columns * 16;
#pragma unroll
  for (int row = 0; row < kRows; row += kTogether) {
    const bool wanted = row < mine && !(skip >> ((first + row) % 64) & 1);
    copy_16(target + row * S::kPitch, from, wanted);
    from += kTogether * pitch;
  }
}

}  // namespace sparse_attention::sm80
