// How a block finds its work: the items that are its share, and the key tiles of each.
#pragma once
#include "tile.h"

namespace sparse_attention {

// The items of one block, over all batches: from a list of its own, or the next of an order that all blocks share. For one thread, a lane 0.
struct Share {
  int batch = -1, n = 0;  // the item at hand: work[n] of this batch
  int turn = 0, stop = 0;

  __device__ __forceinline__ bool next(const Tables& t) {
    const int blocks = gridDim.x, block = blockIdx.x;
    if (t.order) {
      // Shuffled, the ticket is known to be one for the warp and takes uniform registers; without, the producer of sm90 spills.
      const int at = turn++ ? blocks + __shfl_sync(1, atomicAdd(t.ticket, 1), 0) : block;
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
    if (t.bits) filter = w.head % t.bit_heads * (t.bit_rows / 2) + w.tile;
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
    if (filter >= 0 || next_tile != tile + 1 || next_mark != mark) return 0;
    const int count = run->count - within + 1;
    within = run->count;
    find();
    return count;
  }

 private:
  const Tables* t;
  const Run *run, *end;
  int filter = -1;  // the query tile among those of the bits, or -1 without
  int within = 0;   // of the run
  int next_tile, next_mark;

  // The first word from this one on that is not 0, or one past the last.
  __device__ __forceinline__ int used_word(int word) const {
    while (word < t->bit_words) {
      const uint64_t rest = t->used[int64_t{filter} * ((t->bit_words + 63) / 64) + word / 64] >> word % 64;
      if (rest) return word + __ffsll(rest) - 1;
      word = (word / 64 + 1) * 64;
    }
    return t->bit_words;
  }

  __device__ __forceinline__ void find() {
    for (; run < end; ++run, within = 0) {
      const Run now = *run;
      if (filter < 0) {
        if (within == now.count) continue;
        next_tile = now.first + within++, next_mark = now.mask;
        return;
      }
      while (within < now.count) {
        const int at = now.first + within, word = at / 64, shift = at % 64;
        const uint64_t* bits = t->bits + int64_t{filter} * 2 * t->bit_words + word;
        const uint64_t upper = bits[0] >> shift, lower = bits[t->bit_words] >> shift;
        const int skip = __ffsll(upper | lower) - 1;  // -1: none left in this word
        within = (skip < 0 ? 64 * used_word(word + 1) : at + skip) - now.first;
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
