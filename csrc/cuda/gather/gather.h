// The gather engine on one device, as plain C++ sees it: each query row against the keys that a table lists for it.
#pragma once
#include <cstdint>

namespace sparse_attention::gather {

// Strides in elements; the last dimension is contiguous. `row` is less than 2^31 bytes.
struct Strided {
  void* data;
  int64_t batch, head, row;
};

// `count` keys of one row, from its key number `first` on, for `together` heads that begin with `head`.
struct Piece {
  int32_t head, row, first, count;
};
static_assert(sizeof(Piece) == 4 * sizeof(int32_t), "a piece is a row of an int32 tensor");

// The pieces first_piece .. first_piece + pieces - 1 are one row.
struct Split {
  int32_t head, row, first_piece, pieces;
};
static_assert(sizeof(Split) == 4 * sizeof(int32_t), "a split row is a row of an int32 tensor");

// Device pointers; sparse_attention/cuda_rows.py makes the tables. The accumulator is double for f64 and float for the others.
struct Forward {
  Strided q, k, v, out;
  void* lse;      // [batch, heads, q_len], accumulator
  void* partial;  // [batch, n_pieces, together, head_dim], then [batch, n_pieces, together, 2]: what the pieces leave, accumulator
  const int64_t* row_start;     // row r of variant x sees columns[row_start[x * q_len + r] .. row_start[x * q_len + r + 1])
  const int32_t* columns;
  const int32_t* head_variant;  // [heads]
  const Piece* pieces;
  const Split* splits;
  int32_t n_pieces, n_splits;
  int32_t longest;   // rows with more keys are split
  int32_t together;  // heads that one warp takes: 1, 2 or 4; they share their keys, values and variant
  int32_t batch, heads, kv_heads, q_len, head_dim;
  bool apart;    // rows are short and none is split: a warp takes several rows at once
  bool aligned;  // every row of q, k, v and out begins at a multiple of 16 bytes
  double scale;
};

// All return a cudaError_t.
int forward_f32(const Forward& f, void* stream);
int forward_f64(const Forward& f, void* stream);
int forward_bf16(const Forward& f, void* stream);
int forward_f16(const Forward& f, void* stream);

}  // namespace sparse_attention::gather
