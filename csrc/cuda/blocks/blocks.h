// Block masks that become part of a layout on the device: no copy to the host, no wait.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../tile.h"

namespace sparse_attention::blocks {

struct Pack {
  const uint8_t* mask;  // [heads, q_blocks, kv_blocks], 0 or 1
  uint64_t* bits;       // [heads, rows, words]: for each 64 queries, which key tiles they may see
  int32_t heads, q_blocks, kv_blocks, rows, words;
  int32_t rows_a_block, tiles_a_block;  // 64 queries, and key tiles, in one block
};

// All return a cudaError_t.
int pack(const Pack& p, void* stream);

// How many key tiles each item visits: int32 [n_work]. And `used` of struct Tables.
int count(const Tables& t, int32_t* lengths, uint64_t* used, void* stream);

// The items, long ones first, `section` heads at a time, into `order` of `most_pieces`; how many into `n_order`. Those over `outlier` times the
// mean come before all. Items much longer than others are cut for so many processors, into at most `most_slots` parts in all; 0: none is.
int sort(const Tables& t, const int32_t* lengths, Piece* order, int32_t* n_order, int heads, int section, int outlier, int processors, void* stream);
constexpr int64_t most_slots(int64_t n_work, int64_t processors) { return processors ? std::min(8 * processors + 8, kMostParts * n_work) : 0; }
constexpr int64_t most_pieces(int64_t n_work, int64_t processors) { return n_work + most_slots(n_work, processors); }

}  // namespace sparse_attention::blocks
