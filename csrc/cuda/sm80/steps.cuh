// What a block of the sm80 tier does, step by step: the steps of all its query tiles as one sequence, so that the first keys of a
// tile are on their way while the tile before it is finished.
#pragma once
#include <new>

#include "../walk.cuh"
#include "ptx.h"

namespace sparse_attention::sm80 {

struct Params {
  Tables tables;
  Strided q, k, v, out;  // strides in bytes
  float* partial;        // [batch, heads, q_len, head_dim], the output so far where parts merge
  float* lse;            // [batch, heads, q_len]
  int32_t heads, group, q_len, kv_len, head_dim, keys;
  Merge merge;
  float scale_log2;
  float slack;  // how far a score may be above the softmax's base: its weight is then 2^8 at most
};

// One query tile: where its rows lie. Pitches are the bytes from one row of its sequence to the next.
struct Item {
  const uint8_t *q, *k, *v;  // its first query; the sequence's first key and value
  uint8_t* out;
  int64_t q_pitch, k_pitch, v_pitch, out_pitch;
  int64_t lse;                    // of its first query
  int32_t queries, keys, stride;  // how many queries, how many keys the tensor has

  __device__ __forceinline__ Item(const Params& p, const Work& w, int batch) : stride(w.stride) {
    const int tile_first = kTileQueries * w.tile, k_first = w.k_residue + w.stride * w.k_step, kv_head = w.head / p.group;
    const int64_t q_first = w.q_first + int64_t{w.stride} * tile_first;
    const auto row = [batch](const Strided& s, int head, int64_t r) {
      return static_cast<uint8_t*>(s.data) + s.batch * batch + s.head * head + s.row * r;
    };
    q = row(p.q, w.head, q_first), out = row(p.out, w.head, q_first);
    k = row(p.k, kv_head, k_first), v = row(p.v, kv_head, k_first);
    q_pitch = p.q.row * stride, k_pitch = p.k.row * stride, v_pitch = p.v.row * stride, out_pitch = p.out.row * stride;
    lse = (int64_t{batch} * p.heads + w.head) * p.q_len + q_first;
    queries = min(kTileQueries, w.q_count - tile_first);
    keys = (p.kv_len - k_first + stride - 1) / stride;
  }
};

constexpr int kNothing = -1;  // a mask that hides all: the one step of a query tile without keys

// A tile of keys, or a part of one.
struct Step {
  int32_t item;            // 0 or 1; -1 after the last step
  int32_t key, keys;       // the first one; how many the tensor still has
  int32_t mask, part;      // kFull, kNothing or the number of a mask, and which keys of it
  bool first, last, dead;  // of its query tile; whether it holds keys that no query sees
};

// Iterates over the steps of kKeys keys. Lies in shared memory and is moved by one thread.
template <int kKeys>
class Steps {
 public:
  __device__ __forceinline__ void begin() { share = Share(), item = 0, alike = 0, last = true; }

  // Writes the next step, and the query tile that it belongs to if it is the first one.
  __device__ __forceinline__ void next(const Params& p, Step& step, Item (&items)[2]) {
    Walk& walk = *reinterpret_cast<Walk*>(walk_memory);
    step.first = last;
    if (last) {
      if (!share.next(p.tables)) {
        step.item = -1;
        return;
      }
      item ^= 1, part = 0;
      const Work w = p.tables.work[share.n];
      new (&items[item]) Item(p, w, share.batch);
      new (walk_memory) Walk(p.tables, w);
    }
    step.item = item;
    if (last && walk.empty()) {
      step.key = step.keys = 0, step.mask = kNothing, step.dead = false, step.last = true;
      return;
    }
    if (part == 0) {
      if (alike > 0) {
        --alike, ++tile;
      } else {
        walk.step();
        tile = walk.tile, mark = walk.mark, alike = walk.pass(), over = walk.empty();
      }
    }
    step.key = p.keys * tile + kKeys * part, step.keys = items[item].keys - step.key;
    step.mask = mark & kFull, step.part = part, step.dead = mark & kDead;
    if (++part == p.keys / kKeys) part = 0;
    step.last = last = part == 0 && alike == 0 && over;
  }

 private:
  Share share;
  int32_t item, tile, mark, alike;  // the tile at hand; how many follow it with the same mark
  int32_t part;                     // the next step's part of it
  bool over, last;                  // whether nothing follows those; whether the step before was its query tile's last
  alignas(Walk) uint8_t walk_memory[sizeof(Walk)];
};

}  // namespace sparse_attention::sm80
