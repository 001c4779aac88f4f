// The walk over an item's key tiles as a function of a host library, for tests/test_cuda_walk.py.
#include "threads.h"

inline int __shfl_sync(unsigned, int value, int) { return value; }

#include "walk.cuh"

using namespace sparse_attention;

// Writes the number and the mark of each tile to `found`, pairs; returns how many. passing: what `pass` skips is counted, and not written.
extern "C" __attribute__((visibility("default"))) int walk(
    const int32_t* runs, int count, const uint64_t* bits, const uint64_t* used, int words, const int32_t* marks, int masks, int passing, int32_t* found) {
  Tables t{};
  t.runs = reinterpret_cast<const Run*>(runs);
  t.bits = bits, t.used = used, t.bit_heads = 1, t.bit_rows = 2, t.bit_words = words, t.marks = marks, t.bit_masks = masks;
  Walk walk;
  Work item{};
  item.end_run = count;
  if (count) item.run = t.runs[0];
  walk.begin(t, item);
  walk.step(t);
  int n = 0;
  while (!walk.empty()) {
    walk.step(t);
    found[2 * n] = walk.tile, found[2 * n + 1] = walk.mark, ++n;
    if (passing) n += walk.pass(t);
    if (walk.mark & kLast) break;
  }
  return n;
}
