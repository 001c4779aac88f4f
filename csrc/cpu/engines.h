// The engines' entry points, by element type. No torch here.
#pragma once
#include "../params.h"

namespace sparse_attention {

// The type of q, k and v; the accumulator is double for f64 and float for the others.
enum class Dtype { f32, f64, bf16, f16 };

void tile_forward(Dtype, const ForwardParams&, const LayoutParams&);
// `by_query` drives dq; `by_key`, the transposed layout whose rows are key tiles, drives dk and dv.
void tile_backward(Dtype, const BackwardParams&, const LayoutParams& by_query, const LayoutParams& by_key);

// `accumulate` and `out_accumulator` must be false: a row table holds the whole pattern.
void gather_forward(Dtype, const ForwardParams&, const RowsParams&);
// `by_query` drives dq; `by_key`, whose row t lists the queries that see key t, drives dk and dv.
void gather_backward(Dtype, const BackwardParams&, const RowsParams& by_query, const RowsParams& by_key);

// What both backward passes start from: delta = rowsum(dout * out) - dlse (dlse null: 0), [batch, heads, q_len] in the accumulator's
// type. `out` has q's shape.
void row_delta(Dtype, const BackwardParams&, const Tensor4& out, const void* dlse, void* delta);

}  // namespace sparse_attention
