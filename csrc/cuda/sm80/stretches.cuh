// What a block of the sm80 tier does: the keys of all its query tiles as one sequence, so that the first keys of a tile are on their
// way while the tile before it is finished.
#pragma once
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
};

// One query tile: where its rows lie. Pitches are the bytes from one row of its sequence to the next.
struct Item {
  const uint8_t *q, *k, *v;  // its first query; the sequence's first key and value
  uint8_t* out;
  int64_t q_pitch, k_pitch, v_pitch, out_pitch;
  int64_t lse;                    // of its first query
  int32_t queries, keys, stride;  // how many queries, how many keys the tensor has

  Item() = default;
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

// Keys one after the other under one mask, kKeys a step.
struct Stretch {
  int32_t item;            // 0 or 1; -1 after the last one
  int32_t key, steps;      // the first key
  int32_t mask;            // kFull, kNothing or the number of a mask
  bool first, last, dead;  // of its query tile; whether it holds keys that no query sees
};

// Iterates over the stretches of all query tiles of a block. Lies in shared memory; one thread takes it out to move it.
template <int kKeys>
class Stretches {
 public:
  __device__ __forceinline__ Stretches() : item(0), last(true) {}

  // Writes the next one, and the query tile that it belongs to if it is the first there.
  __device__ __forceinline__ void next(const Params& p, Stretch& x, Item (&items)[2]) {
    x.first = last;
    if (last) {
      if (!share.next(p.tables)) {
        x.item = -1;
        return;
      }
      item ^= 1;
      const Work w = p.tables.work[share.n];
      items[item] = Item(p, w, share.batch);
      walk.begin(p.tables, w);
      walk.step(p.tables);
    }
    x.item = item;
    if (walk.empty()) {
      x.key = items[item].keys, x.steps = 1, x.mask = kNothing, x.dead = false, x.last = last = true;
      return;
    }
    walk.step(p.tables);
    x.key = p.keys * walk.tile, x.mask = walk.mark & kFull, x.dead = walk.mark & kDead;
    x.steps = (1 + walk.pass(p.tables)) * (p.keys / kKeys);
    x.last = last = walk.empty();
  }

 private:
  Share share;
  int32_t item;
  bool last;  // whether the stretch before was its query tile's last
  Walk walk;
};

}  // namespace sparse_attention::sm80
