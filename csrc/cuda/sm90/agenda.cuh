// What a block does next, as the thread that copies tiles in asks for it: found by itself, or by a warp that goes some tiles ahead, where
// many words of a block mask have to be looked at.
#pragma once
#include "../walk.cuh"
#include "consumer.cuh"

namespace sparse_attention::sm90 {

// A key tile of an item; -1 where the item has none. mark: with kLast for an item's last.
struct Step {
  int32_t tile, mark;
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
  __device__ __forceinline__ int cut() const { return -1; }
  __device__ __forceinline__ const Work& work() const { return t.work[share.n]; }

 private:
  const Tables& t;
  Share share;
  Walk walk;
  bool first, last = true;
};

// Steps on their way from one warp to a thread of another, some at a time.
struct Agenda {
  static constexpr int kSteps = 8, kPages = 3;

  // Steps of one item. The first page of an item brings the item: work[n] of a batch; n is -1 when there is none left.
  struct alignas(16) Page {
    Work work;
    int32_t n, batch;
    int32_t cut;  // Piece's
    bool both;    // see Share
    bool first;
    int32_t count;
    Step steps[kSteps];
  };
  Page pages[kPages];
  uint64_t full[kPages], empty[kPages];

  __device__ __forceinline__ void init() {
    for (int s = 0; s < kPages; ++s) barrier_init(&full[s], 32), barrier_init(&empty[s], 1);
  }
};

// Fills an agenda. Each lane of one warp looks at a word of the mask.
class Write {
 public:
  __device__ __forceinline__ Write(Agenda& agenda, const Tables& t) : agenda(agenda), t(t), lane(threadIdx.x % 32) {}

  __device__ __forceinline__ void run() {
    const int count = *t.n_order;
    for (int at = blockIdx.x; at < t.batch * count;) {
      Piece piece = t.order[at % count];
      const bool other = !t.cuts && piece.cut >= 0 && part_of(piece.cut) > 0;
      if (!t.cuts) piece.cut = -1;
      if (!other) item(piece.item & ~kSame, at / count, piece);
      at = gridDim.x + __shfl_sync(~0u, lane == 0 ? atomicAdd(t.ticket, 1) : 0, 0);
    }
    begin(true);
    if (lane == 0) page().n = -1;
    turn_over();
  }

 private:
  static constexpr int kFields = sizeof(Work) / sizeof(int32_t);

  Agenda& agenda;
  const Tables& t;
  const int lane;
  Ring<Agenda::kPages> ring;
  int filled = 0;  // steps of the page at hand

  __device__ __forceinline__ Agenda::Page& page() const { return agenda.pages[ring.stage]; }

  __device__ __forceinline__ void begin(bool first) {
    barrier_wait(&agenda.empty[ring.stage], ring.phase ^ 1);
    if (lane == 0) page().first = first;
    filled = 0;
  }

  __device__ __forceinline__ void turn_over() {
    if (lane == 0) page().count = filled;
    barrier_arrive(&agenda.full[ring.stage]);  // each lane for what it wrote
    ring.next();
  }

  __device__ __forceinline__ void item(int n, int batch, const Piece& piece) {
    const int32_t field = lane < kFields ? reinterpret_cast<const int32_t*>(t.work + n)[lane] : 0;
    const int head = __shfl_sync(~0u, field, 0), tile = __shfl_sync(~0u, field, 3), end = __shfl_sync(~0u, field, 2);
    const uint64_t* const bits = t.bits + int64_t{head % t.bit_heads * (t.bit_rows / 2) + tile} * 2 * t.bit_words;
    int low = 0, high = 64 * t.bit_words;
    if (piece.cut >= 0) low = part_begin(t, piece.cut, part_of(piece.cut)), high = part_begin(t, piece.cut, part_of(piece.cut) + 1);
    begin(true);
    if (lane < kFields) reinterpret_cast<int32_t*>(&page().work)[lane] = field;
    if (lane == 0) page().n = n, page().batch = batch, page().cut = piece.cut, page().both = piece.item & kSame;
    Run now{__shfl_sync(~0u, field, 12), __shfl_sync(~0u, field, 13), __shfl_sync(~0u, field, 14)};
    for (int run = __shfl_sync(~0u, field, 1); run < end;) {
      const int from = max(now.first, low), stop = min(now.first + now.count, high);
      for (int first = from / 64; 64 * first < stop; first += 32) words(bits, first + lane, from, stop, now.mask & kFull);
      if (++run < end) now = t.runs[run];
    }
    __syncwarp();
    if (lane == 0) {
      if (filled == 0) page().steps[0] = {-1, kLast};  // only a first page is without tiles
      else page().steps[filled - 1].mark |= kLast;
    }
    filled = max(filled, 1);
    turn_over();
  }

  // The tiles from `from` to stop - 1 of 32 words, one of each lane.
  __device__ __forceinline__ void words(const uint64_t* bits, int word, int from, int stop, int mask) {
    const bool mine = 64 * word < stop;
    const int place = mask == kFull ? t.bit_masks : mask;
    const uint64_t upper = mine ? bits[word] : 0, lower = mine ? bits[t.bit_words + word] : 0;
    const int marks[3] = {t.marks[place], t.marks[t.bit_masks + 1 + place], t.marks[2 * (t.bit_masks + 1) + place]};
    uint64_t left = upper | lower;
    if (64 * word < from) left = 64 * word + 64 <= from ? 0 : left >> (from - 64 * word) << (from - 64 * word);
    if (stop < 64 * word + 64) left = mine ? left << (64 * word + 64 - stop) >> (64 * word + 64 - stop) : 0;
    const int count = __popcll(left);
    int next = count;  // the number of this lane's next tile among those of all
    for (int d = 1; d < 32; d *= 2) {
      const int before = __shfl_up_sync(~0u, next, d);
      if (lane >= d) next += before;
    }
    const int all = __shfl_sync(~0u, next, 31);
    next -= count;
    for (int done = 0; done < all;) {
      if (filled == Agenda::kSteps) turn_over(), begin(false);
      const int taken = min(Agenda::kSteps - filled, all - done);
      for (; left && next < done + taken; left &= left - 1, ++next) {
        const int bit = __ffsll(left) - 1, half = !(lower >> bit & 1) ? 1 : !(upper >> bit & 1) ? 2 : 0;
        page().steps[filled + next - done] = {64 * word + bit, half == 0 ? marks[0] : half == 1 ? marks[1] : marks[2]};
      }
      filled += taken, done += taken;
      __syncwarp();
    }
  }
};

// Steps of an agenda. One thread.
class Read {
 public:
  __device__ __forceinline__ explicit Read(Agenda& agenda) : agenda(agenda) {}

  __device__ __forceinline__ bool next() {
    if (at == 0) barrier_wait(&agenda.full[ring.stage], ring.phase);
    return !is_first() || n() >= 0;
  }

  // The step is not looked at any more.
  __device__ __forceinline__ void done() {
    if (++at < page().count) return;
    at = 0;
    barrier_arrive(&agenda.empty[ring.stage]);
    ring.next();
  }

  __device__ __forceinline__ bool is_first() const { return at == 0 && page().first; }
  __device__ __forceinline__ int tile() const { return page().steps[at].tile; }
  __device__ __forceinline__ int mark() const { return page().steps[at].mark; }
  __device__ __forceinline__ int n() const { return page().n; }
  __device__ __forceinline__ int batch() const { return page().batch; }
  __device__ __forceinline__ bool both() const { return page().both; }
  __device__ __forceinline__ int cut() const { return page().cut; }
  __device__ __forceinline__ const Work& work() const { return page().work; }

 private:
  __device__ __forceinline__ const Agenda::Page& page() const { return agenda.pages[ring.stage]; }

  Agenda& agenda;
  Ring<Agenda::kPages> ring;
  int at = 0;  // of the page's steps
};

}  // namespace sparse_attention::sm90
