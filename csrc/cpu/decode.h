// What the decode engine is told, and its entry point. No torch here.
#pragma once
#include "engines.h"

namespace sparse_attention {

struct DecodeParams {
  Tensor4 q, k, v, out;  // of k and v, `batch` is the stride of requests, or of pages
  void* lse;             // [batch, heads, q_len], in the accumulator's type
  const int64_t* lengths;     // [batch], from 0 to the rows that a request has
  const uint64_t* ancestors;  // [batch or 1, q_len, words], or null: causal
  int64_t ancestors_batch;    // elements from one request's words to the next one's; 0 if all share them
  const int32_t* block_table;  // [batch, most_pages], or null
  int64_t most_pages;
  int32_t page_shift;  // a page has 1 << page_shift rows
  int32_t batch, heads, kv_heads, q_len, head_dim;
  int64_t window, sinks;  // window -1: none
  double scale;
};

void decode_forward(Dtype, const DecodeParams&);

}  // namespace sparse_attention
