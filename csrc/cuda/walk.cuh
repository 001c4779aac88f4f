// How a block finds its work: the items that are its share, and the key tiles of each.
#pragma once
#include "tile.h"

namespace sparse_attention {

// The items of one block, over all batches: from a list of its own, or every `gridDim.x`th of an order, back and forth.
struct Share {
  int batch = -1, n = 0;  // the item at hand: work[n] of this batch
  int turn = 0, stop = 0;

  __device__ __forceinline__ bool next(const Tables& t) {
    const int blocks = gridDim.x, block = blockIdx.x;
    if (t.order) {
      const int at = turn * blocks + (turn % 2 ? blocks - 1 - block : block);
      ++turn;
      if (at >= t.batch * t.n_work) return false;
      batch = at / t.n_work;
      n = t.order[at - batch * t.n_work];
      return true;
    }
    while (turn == stop) {
      if (++batch == t.batch) return false;
      const int list = (block + blocks - batch * t.n_work % blocks) % blocks;  // each batch begins where the last one ended
      turn = t.starts[list], stop = t.starts[list + 1];
    }
    n = turn++;
    return true;
  }
};

// The key tiles of one item in ascending order. The one at hand: its number and its mark, kLast included.
class Walk {
 public:
  int tile, mark;

  Walk() = default;
  __device__ __forceinline__ Walk(const Tables& t, const Work& w) : t(&t), run(t.runs + t.row_start[w.row]), end(t.runs + t.row_start[w.row + 1]) {
    if (t.bits) bits = t.bits + (int64_t{w.head % t.bit_heads} * t.bit_rows + 2 * w.tile) * t.bit_words;
    find();
  }

  __device__ __forceinline__ bool empty() const { return next_tile < 0; }

  // Call again until the mark had kLast.
  __device__ __forceinline__ void step() {
    tile = next_tile, mark = next_mark;
    find();
    if (next_tile < 0) mark |= kLast;
  }

  // Passes over the tiles that follow the one at hand without a gap and with its mark, and says how many they are; 0 under a filter.
  // `empty` then says whether any are left.
  __device__ __forceinline__ int pass() {
    if (bits || next_tile != tile + 1 || next_mark != mark) return 0;
    const int count = run->count - within + 1;
    within = run->count;
    find();
    return count;
  }

 private:
  const Tables* t;
  const Run *run, *end;
  const uint64_t* bits = nullptr;  // of the upper 64 queries; those of the lower ones follow
  int within = 0;                  // of the run
  int next_tile, next_mark;

  __device__ __forceinline__ void find() {
    for (; run < end; ++run, within = 0) {
      const Run now = *run;
      if (!bits) {
        if (within == now.count) continue;
        next_tile = now.first + within++, next_mark = now.mask;
        return;
      }
      while (within < now.count) {
        const int at = now.first + within, word = at / 64, shift = at % 64;
        const uint64_t upper = bits[word] >> shift, lower = bits[t->bit_words + word] >> shift;
        const int skip = __ffsll(upper | lower) - 1;  // -1: none left in this word
        within += skip < 0 ? 64 - shift : skip;
        if (skip < 0 || within >= now.count) continue;
        const int half = !(lower >> skip & 1) ? 1 : !(upper >> skip & 1) ? 2 : 0;
        const int mask = now.mask & kFull;
        next_tile = now.first + within++;
        next_mark = t->marks[half * (t->bit_masks + 1) + (mask == kFull ? t->bit_masks : mask)];
        return;
      }
    }
    next_tile = -1;
  }
};

}  // namespace sparse_attention
