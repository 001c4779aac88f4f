// How a decoding call is cut into blocks: which kernel, and over how many of them the keys are split. Plain C++.
#pragma once
#include <algorithm>

#include "../decode.h"

namespace sparse_attention {

struct DecodeDevice {
  int processors;
  bool clusters;    // blocks can read each other's shared memory: compute capability 9.0 and later
  bool warpgroups;  // 9.0
};

constexpr int kMostCluster = 16;

inline int rows_of(DecodeKernel kernel, int row_bytes, int itemsize) {
  switch (kernel) {
    case DecodeKernel::kNarrow: return 16;
    case DecodeKernel::kWide: return itemsize == 4 && row_bytes > 512 ? 32 : 64;
    default: return 128;
  }
}

// Keys that one request's queries visit at most.
inline int64_t visited_keys(const Decode& d) {
  const int64_t keys = d.lengths ? d.capacity : d.length;
  return d.window < 0 ? keys : std::min<int64_t>(keys, int64_t{d.window} + d.sinks + d.q_len);
}

// Warpgroup products are twice as fast as warp products, and take a block's whole multiprocessor and a microsecond more to begin: for
// many rows over many keys. Blocks of 16 rows share the keys of a tile among their warps.
inline DecodeKernel choose_kernel(const Decode& d, int itemsize, const DecodeDevice& device) {
  const int rows = d.heads / d.kv_heads * d.q_len;
  if (rows <= 16) return DecodeKernel::kNarrow;
  if (device.warpgroups && itemsize == 2 && d.head_dim <= 128 && rows > 64 && visited_keys(d) >= 8192) return DecodeKernel::kWarpgroups;
  return DecodeKernel::kWide;
}

// As many blocks as run at once, and two tiles of keys or more for each. A cluster merges up to 16 splits; more, where nothing else fills
// the device, take another launch.
inline void split_keys(Decode& d, DecodeKernel kernel, int itemsize, const DecodeDevice& device) {
  const int dim = d.head_dim <= 64 ? 64 : d.head_dim <= 128 ? 128 : 256, row_bytes = dim * itemsize;
  const int rows = d.heads / d.kv_heads * d.q_len, tile_rows = rows_of(kernel, row_bytes, itemsize);
  const int64_t blocks = int64_t{d.batch} * d.kv_heads * ((rows + tile_rows - 1) / tile_rows);
  const bool warpgroups = kernel == DecodeKernel::kWarpgroups;
  const int least = warpgroups ? 128 : 2 * (row_bytes <= 256 ? 64 : row_bytes <= 512 ? 32 : 16);
  const int resident = !warpgroups && kernel != DecodeKernel::kTall && dim <= 128 ? 2 : 1;
  const int64_t most = std::max<int64_t>(1, visited_keys(d) / least), wanted = int64_t{device.processors} * resident / blocks;
  int64_t splits = std::max<int64_t>(1, std::min(most, wanted));
  d.cluster = 1;
  if (device.clusters && !warpgroups && splits > 1 && (splits <= kMostCluster || 2 * kMostCluster * blocks >= device.processors)) {
    while (2 * d.cluster <= std::min<int64_t>(splits, kMostCluster)) d.cluster *= 2;
    splits = d.cluster;
  }
  d.splits = static_cast<int32_t>(splits);
}

}  // namespace sparse_attention
