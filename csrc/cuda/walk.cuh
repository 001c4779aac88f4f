// How a block finds its work: the items that are its share, and the key tiles of each.
#pragma once
#include "tile.h"

namespace sparse_attention {

// Struct Piece's `cut`, of a part.
__device__ __forceinline__ int part_of(int cut) { return cut / kMostParts % kMostParts; }
__device__ __forceinline__ int parts_of(int cut) { return cut % kMostParts + 1; }
__device__ __forceinline__ int slot_of(int cut) { return cut / (kMostParts * kMostParts); }

// The first tile of a part of a cut item.
__device__ __forceinline__ int part_begin(const Tables& t, int cut, int part) { return int64_t{64} * t.bit_words * part / parts_of(cut); }

// The items of one block, over all batches: from a list of its own, or the next of an order that all blocks share, where the
// first of an item's parts stands for all of it. For one thread, a lane 0.
struct Share {
  int batch = -1, n = 0;  // the item at hand: work[n] of this batch
  bool both = false;      // under a filter: whether both halves of its queries see the same tiles
  int turn = 0, stop = 0;

  __device__ __forceinline__ bool next(const Tables& t) {
    const int blocks = gridDim.x, block = blockIdx.x;
    if (t.order) {
      const int count = *t.n_order;
      Piece piece;
      do {
        // Shuffled, the ticket is known to be one for the warp and takes uniform registers; without, the producer of sm90 spills.
        const int at = turn++ ? blocks + __shfl_sync(1, atomicAdd(t.ticket, 1), 0) : block;
        if (at >= t.batch * count) return false;
        batch = at / count;
        piece = t.order[at - batch * count];
      } while (piece.cut >= 0 && part_of(piece.cut) > 0);
      n = piece.item & ~kSame, both = piece.item & kSame;
      return true;
    }
    while (turn == stop) {
      if (++batch == t.batch) return false;
      const int list = (block + blocks - batch * t.n_work % blocks) % blocks;  // each batch begins where the last one ended
      turn = t.starts[list], stop = t.starts[list + 1];
      if (list < t.n_work) return n = list, true;  // while the list's other items are looked up
    }
    n = turn++;
    return true;
  }
};

// The key tiles of one item in ascending order. The one at hand: its number and its mark, kLast included.
class Walk {
 public:
  int tile, mark;

  // The item's first tile is at hand after two steps, and known to be there, or `empty`, after one.
  __device__ __forceinline__ void begin(const Tables& t, const Work& w) {
    at = w.run.first, stop = at + w.run.count, run_mask = w.run.mask;
    next_mark = 0, filter = word = next_tile = -1;
    if (t.bits) {
      filter = w.head % t.bit_heads * (t.bit_rows / 2) + w.tile;
      ask(t, 0);  // most runs begin there
    }
    run = min(w.first_run + 1, w.end_run), end = w.end_run;
  }

  __device__ __forceinline__ bool empty() const { return next_tile < 0; }

  // Call again until the mark had kLast.
  __device__ __forceinline__ void step(const Tables& t) {
    tile = next_tile, mark = next_mark;
    find(t);
    if (next_tile < 0) mark |= kLast;
  }

  // Passes over the tiles that follow the one at hand without a gap and with its mark, and says how many they are; 0 under a filter.
  // `empty` then says whether any are left.
  __device__ __forceinline__ int pass(const Tables& t) {
    if (filter >= 0 || next_tile != tile + 1 || next_mark != mark) return 0;
    const int count = stop - at + 1;
    at = stop;
    find(t);
    return count;
  }

 private:
  int run, end;            // those not begun
  int at, stop, run_mask;  // what is left of the run at hand: tiles at to stop - 1
  int next_tile, next_mark;
  int filter;              // the query tile among those of the bits, or -1 without
  int word, coming;        // the words of bits at hand, and the next that are not 0, on their way while those at hand are used
  uint64_t upper, lower, coming_upper, coming_lower;

  // Asks for the first words from this one on that are not 0.
  __device__ __forceinline__ void ask(const Tables& t, int from) {
    const uint64_t* used = t.used + int64_t{filter} * ((t.bit_words + 63) / 64);
    for (coming = from; coming < t.bit_words; coming = (coming / 64 + 1) * 64)
      if (const uint64_t rest = used[coming / 64] >> coming % 64) {
        coming += __ffsll(rest) - 1;
        const uint64_t* bits = t.bits + int64_t{filter} * 2 * t.bit_words + coming;
        coming_upper = bits[0], coming_lower = bits[t.bit_words];
        return;
      }
  }

  // The words of tile `at`, or the first later ones; false where the run has none.
  __device__ __forceinline__ bool turn(const Tables& t) {
    for (int wanted = at / 64; word != wanted;) {
      int from = wanted;
      if (coming >= wanted) {
        if (coming >= t.bit_words || 64 * coming >= stop) return false;
        word = wanted = coming, upper = coming_upper, lower = coming_lower;
        at = max(at, 64 * word);
        from = word + 1;
      }
      ask(t, from);
    }
    return true;
  }

  __device__ __forceinline__ void find(const Tables& t) {
    for (;;) {
      if (at >= stop) {
        if (run == end) break;
        const Run now = t.runs[run++];
        at = now.first, stop = at + now.count, run_mask = now.mask;
        continue;
      }
      if (filter >= 0) {
        const uint64_t any = turn(t) ? (upper | lower) >> at % 64 : 0;
        at = any ? at + __ffsll(any) - 1 : word == at / 64 ? 64 * (word + 1) : stop;
        if (!any || at >= stop) continue;
      }
      next_tile = at++, next_mark = filter < 0 ? run_mask : halved(t, next_tile);
      return;
    }
    next_tile = -1;
  }

  // The mark of a tile that perhaps only one half of the queries sees.
  __device__ __forceinline__ int halved(const Tables& t, int tile) const {
    const int half = !(lower >> tile % 64 & 1) ? 1 : !(upper >> tile % 64 & 1) ? 2 : 0, mask = run_mask & kFull;
    return t.marks[half * (t.bit_masks + 1) + (mask == kFull ? t.bit_masks : mask)];
  }
};

}  // namespace sparse_attention
