// What a block does next, as the thread that copies tiles in asks for it: found by itself, or by another thread some steps ahead, which is
// worth its barriers where tables are read word by word.
#pragma once
#include "../walk.cuh"
#include "consumer.cuh"

namespace sparse_attention::sm90 {

// A key tile of an item. The first one brings the item; it is the only one where there is no tile, and then its tile is -1.
struct alignas(16) Step {
  Work work;
  int32_t tile, mark;  // mark: with kLast for an item's last
  int32_t n, batch;    // the item, work[n] of a batch. These and what follows: of first steps
  bool first, both;    // both: see Share
};

// Steps found when they are asked for. One thread, a lane 0.
class Found {
 public:
  __device__ __forceinline__ explicit Found(const Tables& t) : t(t) {}

  __device__ __forceinline__ bool next() {
    first = last;
    if (first) {
      if (!share.next(t)) return false;
      walk.begin(t, work());
      walk.step(t);
    }
    if (walk.empty()) walk.tile = -1, walk.mark = kLast;
    else walk.step(t);
    last = walk.mark & kLast;
    return true;
  }

  __device__ __forceinline__ void done() {}
  __device__ __forceinline__ bool is_first() const { return first; }
  __device__ __forceinline__ int tile() const { return walk.tile; }
  __device__ __forceinline__ int mark() const { return walk.mark; }
  __device__ __forceinline__ int n() const { return share.n; }
  __device__ __forceinline__ int batch() const { return share.batch; }
  __device__ __forceinline__ bool both() const { return share.both; }
  __device__ __forceinline__ const Work& work() const { return t.work[share.n]; }

 private:
  const Tables& t;
  Share share;
  Walk walk;
  bool first, last = true;
};

// Steps on their way from one thread to another.
struct Agenda {
  static constexpr int kSteps = 8;
  Step steps[kSteps];
  Share share;  // these two of the writer alone: its registers are few
  Walk walk;
  uint64_t full[kSteps], empty[kSteps];

  __device__ __forceinline__ void init() {
    for (int s = 0; s < kSteps; ++s) barrier_init(&full[s], 1), barrier_init(&empty[s], 1);
  }

  // By one thread, a lane 0.
  __device__ __forceinline__ void write(const Tables& t) {
    Ring<kSteps> ring;
    const auto turn_over = [&] {
      barrier_arrive(&full[ring.stage]);
      ring.next();
      barrier_wait(&empty[ring.stage], ring.phase ^ 1);
      steps[ring.stage].first = false;
    };
    for (share = Share{}; share.next(t);) {
      Step& begun = steps[ring.stage];
#pragma unroll 1
      for (int i = 0; i < 3; ++i) reinterpret_cast<uint4*>(&begun.work)[i] = reinterpret_cast<const uint4*>(t.work + share.n)[i];
      begun.n = share.n, begun.batch = share.batch, begun.both = share.both, begun.first = true;
      walk.begin(t, begun.work);
      do {
        walk.step(t);
        if (walk.tile < 0 && !walk.empty()) continue;  // the first one is ahead
        steps[ring.stage].tile = walk.tile, steps[ring.stage].mark = walk.mark;
        turn_over();
      } while (!(walk.mark & kLast));
    }
    steps[ring.stage].first = true, steps[ring.stage].n = -1;
    barrier_arrive(&full[ring.stage]);
  }
};

// Steps of an agenda. One thread.
class Read {
 public:
  __device__ __forceinline__ explicit Read(Agenda& agenda) : agenda(agenda) {}

  __device__ __forceinline__ bool next() {
    barrier_wait(&agenda.full[ring.stage], ring.phase);
    return !is_first() || n() >= 0;
  }

  // The step is not looked at any more.
  __device__ __forceinline__ void done() {
    barrier_arrive(&agenda.empty[ring.stage]);
    ring.next();
  }

  __device__ __forceinline__ bool is_first() const { return at().first; }
  __device__ __forceinline__ int tile() const { return at().tile; }
  __device__ __forceinline__ int mark() const { return at().mark; }
  __device__ __forceinline__ int n() const { return at().n; }
  __device__ __forceinline__ int batch() const { return at().batch; }
  __device__ __forceinline__ bool both() const { return at().both; }
  __device__ __forceinline__ const Work& work() const { return at().work; }

 private:
  __device__ __forceinline__ const Step& at() const { return agenda.steps[ring.stage]; }

  Agenda& agenda;
  Ring<Agenda::kSteps> ring;
};

}  // namespace sparse_attention::sm90
