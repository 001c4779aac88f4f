// A few queries over a cache of keys and values, as plain C++ sees it; sparse_attention/decode.py says what it means.
#pragma once
#include <cstdint>

#include "tile.h"

namespace sparse_attention {

// Device pointers. Rows: the queries of one group of heads, query by query: row r is query r / group of head kv_head * group + r % group.
struct Decode {
  Strided q, out;  // [batch, heads, q_len, head_dim]
  Strided k, v;    // [batch, kv_heads, capacity, head_dim], or [pages, kv_heads, page, head_dim] with a block table: batch is then a page's stride
  float* lse;      // [batch, heads, q_len]; or null
  float* part_out;  // [splits / cluster, batch, kv_heads, rows, head_dim] and
  float* part_lse;  // [splits / cluster, batch, kv_heads, rows] where `join` merges the clusters
  const int64_t* lengths;     // [batch]: keys, the new ones included; or null:
  int64_t length;             // of every request
  const uint64_t* ancestors;  // [ancestor_batch, q_len, words] or null: causal among the new ones
  const int32_t* block_table;  // [batch, table_width] or null
  int32_t batch, heads, kv_heads, group, q_len, head_dim;  // group: heads / kv_heads
  int32_t capacity;  // keys that a request may have
  int32_t page, pages, table_width;  // without a table: capacity, batch, 0
  int32_t ancestor_batch, words;
  int32_t window, sinks;  // window: -1 for none
  int32_t splits;      // of the keys: a multiple of
  int32_t cluster;     // blocks that merge their splits in shared memory
  uint64_t group_inverse, kv_inverse;  // 2^32 / group and / kv_heads, rounded up
  float scale;         // above 0
};

// Warp matrix products (compute capability 8.0 and later) on blocks of 16 rows, of 64 with eight warps, and of 64 with four, two blocks at
// once; warpgroup products (9.0, head_dim up to 128) on 128 rows, and on 64 with two blocks at once.
enum class DecodeKernel : int32_t { kNarrow, kWide, kMany, kWarpgroups, kWarpgroup };

constexpr bool by_warpgroups(DecodeKernel kernel) { return kernel >= DecodeKernel::kWarpgroups; }

// All return a cudaError_t.
namespace decoding {
int run_bf16(const Decode& d, DecodeKernel kernel, void* stream);
int run_f16(const Decode& d, DecodeKernel kernel, void* stream);
int run_f32(const Decode& d, DecodeKernel kernel, void* stream);
}  // namespace decoding
namespace sm90 {
int decode_bf16(const Decode& d, DecodeKernel kernel, void* stream);
int decode_f16(const Decode& d, DecodeKernel kernel, void* stream);
}  // namespace sm90

}  // namespace sparse_attention
