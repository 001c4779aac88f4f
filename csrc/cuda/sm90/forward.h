// One part of a layout on one Hopper device, as plain C++ sees it.
#pragma once
#include <cstdint>

namespace sparse_attention::sm90 {

// Strides in elements: multiples of 8, and `data` aligned to 16 bytes; the last dimension is contiguous.
struct Strided {
  void* data;
  int64_t batch, head, row;
};

// How a part treats what earlier parts left: all but the last write `partial`.
enum Merge : int32_t { kAlone, kFirstPart, kMiddlePart, kLastPart };

constexpr int kTileQueries = 128;

// Device pointers; sparse_attention/cuda_tables.py makes the tables.
struct Forward {
  Strided q, k, v, out;
  float* partial;  // [batch, heads, q_len, head_dim] where the layout has several parts
  float* lse;      // [batch, heads, q_len]
  const int32_t* work;    // [n_work, 12]
  const int32_t* starts;  // [processors + 1]: which of them each block takes
  const int32_t* row_start;
  const int32_t* runs;  // [n_runs, 3]
  const uint64_t *masks, *dead;
  int32_t n_work, batch, heads, kv_heads, q_len, kv_len, head_dim, stride, keys;  // keys: of a tile
  Merge merge;
  bool has_dead;  // some run is marked kDead
  int32_t processors;  // blocks
  float scale;  // above 0
};

// Both return a cudaError_t.
int forward_bf16(const Forward& f, void* stream);
int forward_f16(const Forward& f, void* stream);

}  // namespace sparse_attention::sm90
