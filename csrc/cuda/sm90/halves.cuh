// Tiles of which often only one half of the queries sees something: each warpgroup multiplies those that its half sees, and passes over the
// others. The warpgroups therefore take no turns.
#pragma once
#include "consumer.cuh"

namespace sparse_attention::sm90 {

// Warps pass tiles over without meeting each other, so each of them says when it is done.
constexpr int kWarpsThatSay = 8;

// Attend's loop for one half. A has sees(mask, all): whether this half sees something of a tile, and whether all of it.
template <class S, typename T, bool kBury, class A>
struct Half {
  Attend<S, T, kBury, A>& a;
  Shared<S>& shared;
  Ring<S::kStages>&k_ring, &v_ring;
  int mark = 0, passed = 0;        // of the tile at hand; tiles passed over whose values are still there
  bool all = false;  // whether this half sees all of it
  float s[S::kKeys / 2], worth[2];
  uint32_t weights[S::kKeys / 16][4];

  __device__ __forceinline__ Half(Attend<S, T, kBury, A>& a, Ring<S::kStages>& k_ring, Ring<S::kStages>& v_ring)
      : a(a), shared(a.shared), k_ring(k_ring), v_ring(v_ring) {}

  __device__ __forceinline__ void say(uint64_t& barrier) const {
    __syncwarp();
    if (a.lane == 0) barrier_arrive(&barrier);
  }

  __device__ __forceinline__ void run() {
    do {
      const bool some = find();
      if (some) attend();
      give_back();
    } while (!(mark & kLast));
  }

 private:
  // Tiles that this half sees, from the one at hand on, until too many that it does not see follow each other.
  __device__ __forceinline__ void attend() {
    a.score(s, k_ring.stage);
    products_wait<0>();
    scored();
    a.convert(weights, s);
    a.rescale(worth);
    for (;;) {
      give_back();  // those before the tile whose weights are there
      const int earlier = mark;
      const bool more = find();
      barrier_wait(&shared.v_full[v_ring.stage], v_ring.phase);
      if (kBury && earlier & kDead) a.self().bury(earlier & kFull, v_ring.stage);
      if (!more) break;
      a.score(s, k_ring.stage);
      a.weigh(weights, v_ring.stage);
      products_wait<1>();
      scored();
      products_wait<0>();
      weighed();
      a.convert(weights, s);
      a.rescale(worth);
    }
    a.weigh(weights, v_ring.stage);
    products_wait<0>();
    weighed();
  }

  // The next tile that this half sees. Values of those passed over lie behind the ones that weights wait for, so no more are passed at once
  // than there are stages.
  __device__ __forceinline__ bool find() {
    while (!(mark & kLast) && passed < S::kStages) {
      barrier_wait(&shared.k_full[k_ring.stage], k_ring.phase);
      mark = shared.mask[k_ring.stage];
      if (a.self().sees(mark & kFull, all)) return true;
      say(shared.k_empty[k_ring.stage]);
      k_ring.next(), ++passed;
      if (mark & kLast) a.self().scored_last();
    }
    return false;
  }

  __device__ __forceinline__ void scored() {
    pin(s);
    say(shared.k_empty[k_ring.stage]);
    k_ring.next();
    if (mark & kLast) a.self().scored_last();
    if (!all) a.self().hide(s, mark & kFull);
    a.soften(s, worth);
  }

  __device__ __forceinline__ void weighed() {
#pragma unroll
    for (int c = 0; c < a.kChunks; ++c) pin(a.out[c]);
    say(shared.v_empty[v_ring.stage]);
    v_ring.next();
  }

  __device__ __forceinline__ void give_back() {
    for (; passed; --passed, v_ring.next()) {
      barrier_wait(&shared.v_full[v_ring.stage], v_ring.phase);  // before, the stage is not this tile's to give back
      say(shared.v_empty[v_ring.stage]);
    }
  }
};

}  // namespace sparse_attention::sm90
