// What an engine is told: raw pointers, sizes and strides. No torch here, so every engine also compiles alone.
#pragma once
#include <cstdint>

namespace sparse_attention {

// One sequence inside the tensors: queries q_first + stride * s for s < q_count, keys k_first + stride * t for t < k_count.
struct View {
  int32_t q_first, k_first, stride, q_count, k_count, row_base;
};
static_assert(sizeof(View) == 6 * sizeof(int32_t), "a view is a row of an int32 tensor");

// `count` consecutive tiles from tile `first`; mask -1: every pair is allowed, else all share mask number `mask`.
struct Run {
  int32_t first, count, mask;
};
static_assert(sizeof(Run) == 3 * sizeof(int32_t), "a run is a row of an int32 tensor");

// One part of a layout (see docs/design.md). `rows` index query tiles; for the transposed layout, key tiles.
struct LayoutParams {
  const View* views;
  const int32_t* variant_views;  // [variants + 1]
  const int32_t* head_variant;   // [heads]
  const int32_t* row_start;      // [rows + 1]
  const Run* runs;
  const uint64_t* masks;    // [n_masks, tile]: word r holds the columns that query row r sees
  const uint64_t* masks_t;  // [n_masks, tile]: word c holds the query rows that see key column c
};

// Scattered keys: query row r of variant x sees key columns[row_start[x * q_len + r] .. row_start[x * q_len + r + 1]).
struct RowsParams {
  const int64_t* row_start;     // [variants * rows + 1]
  const int32_t* columns;
  const int32_t* head_variant;  // [heads]
};

// Strides are in elements; the last dimension is contiguous.
struct Tensor4 {
  void* data;
  int64_t batch, head, row;
};

struct ForwardParams {
  Tensor4 q, k, v, out;
  void* lse;  // [batch, heads, q_len], contiguous, in the accumulator's type
  int32_t batch, heads, kv_heads, q_len, kv_len, head_dim;
  double scale;
  bool accumulate;       // merge with what `out` and `lse` hold: a later part of the same pattern
  bool out_accumulator;  // `out` holds the accumulator's type, not that of q, k and v
};

struct BackwardParams {
  Tensor4 q, k, v, dout;
  Tensor4 dq, dk, dv;  // contiguous, in the accumulator's type; parts add to them
  const void* lse;     // [batch, heads, q_len]
  const void* delta;   // [batch, heads, q_len]: rowsum(dout * out) - dlse
  int32_t batch, heads, kv_heads, q_len, kv_len, head_dim;
  double scale;
};

}  // namespace sparse_attention
