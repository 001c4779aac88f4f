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
    case DecodeKernel::kWide:
    case DecodeKernel::kMany: return itemsize == 4 && row_bytes > 512 ? 32 : 64;
    case DecodeKernel::kWarpgroup: return 64;
    default: return 128;
  }
}

// Bytes of a row in shared memory.
inline int row_bytes_of(const Decode& d, int itemsize) { return (d.head_dim <= 64 ? 64 : d.head_dim <= 128 ? 128 : 256) * itemsize; }

constexpr int64_t kMostBlocks = 65535;  // along a grid's third axis, the requests, and its second:

// The heads of the cache times the tiles of their rows.
inline int64_t row_blocks(const Decode& d, DecodeKernel kernel, int itemsize) {
  const int64_t rows = int64_t{d.heads / d.kv_heads} * d.q_len, tile_rows = rows_of(kernel, row_bytes_of(d, itemsize), itemsize);
  return d.kv_heads * ((rows + tile_rows - 1) / tile_rows);
}

// Keys that one request's queries visit at most.
inline int64_t visited_keys(const Decode& d) {
  const int64_t keys = d.lengths ? d.capacity : d.length;
  return d.window < 0 ? keys : std::min<int64_t>(keys, int64_t{d.window} + d.sinks + d.q_len);
}

constexpr int kPortableCluster = 8;  // blocks, on any device that has clusters

// How many blocks of a kernel may merge their splits in shared memory.
inline int most_cluster(DecodeKernel kernel) {
  return kernel == DecodeKernel::kWarpgroups ? 1 : kernel == DecodeKernel::kWarpgroup ? kPortableCluster : kMostCluster;
}

// How many splits of `blocks` blocks of one warpgroup are at work at once: two on a multiprocessor, less an eighth, which clusters of eight
// cannot use.
inline int64_t warpgroup_splits(const DecodeDevice& device, int64_t blocks) { return int64_t{device.processors} * 7 / 4 / blocks; }

// Measured on an H100, warp products also on an H200. Blocks of 16 rows share the keys of a tile among their warps: the quickest where rows
// or keys are few. Where there are warpgroups, 64 rows a block are the quickest while all blocks are at work at once, 128 beyond: these read
// keys half as often, and begin and merge later. Elsewhere eight warps on 64 rows are quicker than four with two blocks at once while every
// block has a multiprocessor and a few tiles.
inline DecodeKernel choose_kernel(const Decode& d, int itemsize, const DecodeDevice& device) {
  const int rows = d.heads / d.kv_heads * d.q_len;
  const int64_t keys = visited_keys(d), groups = int64_t{d.batch} * d.kv_heads, blocks = groups * ((rows + 63) / 64);
  if (rows <= 16 || (keys <= 128 && groups * ((rows + 15) / 16) <= 2 * device.processors)) return DecodeKernel::kNarrow;
  if (itemsize > 2 || d.head_dim > 128) return DecodeKernel::kWide;
  if (device.warpgroups) {
    const bool few = keys <= 512 ? blocks <= device.processors : rows <= 64 || (keys < 4096 && warpgroup_splits(device, blocks) >= 4);
    return few ? DecodeKernel::kWarpgroup : DecodeKernel::kWarpgroups;
  }
  return keys <= 512 && blocks <= device.processors ? DecodeKernel::kWide : DecodeKernel::kMany;
}

// Splits of less than 4,096 keys, all of them one cluster's. Clusters of 8 whose blocks have nearly all multiprocessors to themselves do not
// all find room so (15 of 16 on an H100); of 6 they do: 26 nodes after 2,048 tokens take 15.7 us in 6 splits, 16.1 in 8. After 3,500 they take
// 18.9 and 18.0, since each block has more tiles.
inline int64_t cluster_splits(const DecodeDevice& device, int64_t blocks, int64_t keys) {
  const int64_t splits = std::max<int64_t>(1, std::min({int64_t{kPortableCluster}, keys / 256, warpgroup_splits(device, blocks)}));
  const int64_t used = splits * blocks;
  return keys < 3072 && used <= device.processors && 4 * used > 3 * device.processors ? std::min<int64_t>(splits, 6) : splits;
}

// As many blocks as there are multiprocessors, twice as many small ones, and a few tiles of keys for each: a cluster that finds no room
// beside the others waits for all of them. A cluster merges up to most_cluster splits; more, where nothing else fills the device, take another
// launch.
inline void split_keys(Decode& d, DecodeKernel kernel, int itemsize, const DecodeDevice& device) {
  const int row_bytes = row_bytes_of(d, itemsize);
  const int64_t blocks = d.batch * row_blocks(d, kernel, itemsize), keys = visited_keys(d);
  d.cluster = 1;
  if (kernel == DecodeKernel::kWarpgroup && keys < 4096) {
    d.splits = d.cluster = cluster_splits(device, blocks, keys);
    return;
  }
  const int least = by_warpgroups(kernel) ? 128 : 2 * (row_bytes <= 256 ? 64 : row_bytes <= 512 ? 32 : 16);
  const int resident = kernel == DecodeKernel::kNarrow && d.head_dim <= 128 ? 2 : 1;
  const int64_t most = std::max<int64_t>(1, keys / least), wanted = int64_t{device.processors} * resident / blocks;
  int64_t splits = std::max<int64_t>(1, std::min(most, wanted));
  if (device.clusters && !by_warpgroups(kernel) && splits > 1 && (splits <= kMostCluster || 2 * kMostCluster * blocks >= device.processors)) {
    while (2 * d.cluster <= std::min<int64_t>(splits, kMostCluster)) d.cluster *= 2;
    splits = d.cluster;
  }
  d.splits = static_cast<int32_t>(splits);
}

}  // namespace sparse_attention
