// What a grid can hold. Plain C++.
#pragma once
#include "plan.h"

namespace sparse_attention {

constexpr int64_t kMostBlocks = 65535;  // along a grid's third axis, the requests, and its second:

// The heads of the cache times the tiles of their rows.
inline int64_t row_blocks(const Decode& d, DecodeKernel kernel, int itemsize) {
  const int dim = d.head_dim <= 64 ? 64 : d.head_dim <= 128 ? 128 : 256, tile_rows = rows_of(kernel, dim * itemsize, itemsize);
  const int64_t rows = int64_t{d.heads / d.kv_heads} * d.q_len;
  return d.kv_heads * ((rows + tile_rows - 1) / tile_rows);
}

}  // namespace sparse_attention
