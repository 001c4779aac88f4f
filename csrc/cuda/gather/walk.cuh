// How a warp goes through the keys of a row: which lane reads what, and the arithmetic of a step.
#pragma once
#include "softmax.cuh"

namespace sparse_attention::gather {
namespace {

template <typename T_, int kLanes_, int kChunks_, int kHeads_, bool kAligned_, bool kApart_>
struct Shape {
  using T = T_;
  using A = typename Accumulator<T>::Type;
  static constexpr int kLanes = kLanes_;    // of a group
  static constexpr int kChunks = kChunks_;  // that each lane holds of a row; chunk c of lane l begins at element (c * kLanes + l) * kPer
  static constexpr int kHeads = kHeads_;
  static constexpr bool kAligned = kAligned_;
  static constexpr bool kApart = kApart_;  // each group has a row of its own
  static constexpr int kPer = kChunkBytes / sizeof(T);
  static constexpr int kElements = kChunks * kPer;
  static constexpr int kGroups = 32 / kLanes;
  static constexpr int kRows = kApart ? kGroups : 1;    // of a warp
  static constexpr int kAbreast = kApart ? 1 : kGroups;  // keys of one row that the groups take at a time
  static constexpr int kKeys = kChunks == 1 ? 4 : kChunks == 2 && kHeads < 4 ? 2 : 1;  // of a group in flight
  static constexpr int kStep = kAbreast * kKeys;
  // One running sum over a long row would lose several times what PyTorch loses; a 16-bit output does not show it.
  static constexpr bool kFolds = sizeof(T) >= 4;
  static constexpr int kFold = 16 * kStep;
  // Blocks that a multiprocessor should hold: bytes in flight are what hides the latency of the L2 cache.
  static constexpr int kBlocks = kHeads > 1 || sizeof(T) == 8 || !kAligned ? 2 : kElements <= 8 ? 4 : kApart ? 2 : 3;
  using State = Softmax<A, kHeads, kElements>;
};

// Keys of a row: columns[0 .. count).
struct List {
  const int32_t* columns;
  int count;
};

// Where a lane reads.
struct Source {
  const char *keys, *values;  // its first chunk of key and value 0
  uint32_t key_bytes, value_bytes;  // from row to row
  int group;
};

// The first keys of a list, read ahead: `column[n]` is that of slot n of this lane's group.
template <class S>
struct Ahead {
  int column[S::kKeys];

  // The key of slot n in the step that begins at key `begin`.
  __device__ static int place(int begin, int n, int group) { return begin + n * S::kAbreast + (S::kApart ? 0 : group); }

  __device__ void read(const List& list, int begin, int group) {
#pragma unroll
    for (int n = 0; n < S::kKeys; ++n) {
      const int at = place(begin, n, group);
      column[n] = at < list.count ? __ldg(list.columns + at) : 0;
    }
  }
};

template <class S>
struct Walk {
  using T = typename S::T;
  using A = typename S::A;
  using State = typename S::State;
  static constexpr int kChunkStride = S::kLanes * S::kPer;  // elements

  const Source& from;
  const List& list;
  const A (&q)[S::kHeads][S::kElements];
  const bool (&mine)[S::kChunks];
  const A scale;  // with log2(e)
  Ahead<S> ahead;  // of the next step

  __device__ void fetch_row(uint4 (&to)[S::kChunks], const char* first, uint32_t bytes, int row, bool here) const {
    const T* p = reinterpret_cast<const T*>(first + uint64_t(uint32_t(row)) * bytes);
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) {
      to[c] = make_uint4(0, 0, 0, 0);
      if (here & mine[c]) to[c] = fetch<T, S::kAligned>(p + c * kChunkStride);
    }
  }

  __device__ static void widen_row(A (&to)[S::kElements], const uint4 (&chunks)[S::kChunks]) {
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) {
      A part[S::kPer];
      widen(chunks[c], part, T());
#pragma unroll
      for (int e = 0; e < S::kPer; ++e) to[c * S::kPer + e] = part[e];
    }
  }

  // kWhole: no slot of the step is past the end of the row.
  template <bool kWhole>
  __device__ void step(State& state, int begin) {
    uint4 k[S::kKeys][S::kChunks], v[S::kKeys][S::kChunks];
    bool here[S::kKeys];
#pragma unroll
    for (int n = 0; n < S::kKeys; ++n) {
      here[n] = kWhole || Ahead<S>::place(begin, n, from.group) < list.count;
      fetch_row(k[n], from.keys, from.key_bytes, ahead.column[n], here[n]);
      fetch_row(v[n], from.values, from.value_bytes, ahead.column[n], here[n]);
    }
    ahead.read(list, begin + S::kStep, from.group);

    A score[S::kHeads][S::kKeys];
#pragma unroll
    for (int n = 0; n < S::kKeys; ++n) {
      A key[S::kElements];
      widen_row(key, k[n]);
#pragma unroll
      for (int h = 0; h < S::kHeads; ++h) {
        A dot = 0;
#pragma unroll
        for (int e = 0; e < S::kElements; ++e) dot += q[h][e] * key[e];
        score[h][n] = dot;
      }
    }
#pragma unroll
    for (int distance = S::kLanes / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int h = 0; h < S::kHeads; ++h) {
#pragma unroll
        for (int n = 0; n < S::kKeys; ++n) score[h][n] += __shfl_xor_sync(~0u, score[h][n], distance);
      }
    }
#pragma unroll
    for (int h = 0; h < S::kHeads; ++h) {
      A most = state.top[h];
#pragma unroll
      for (int n = 0; n < S::kKeys; ++n) {
        score[h][n] = here[n] ? score[h][n] * scale : -infinity<A>();
        most = larger(most, score[h][n]);
      }
      const A decay = power_of_2(state.top[h] - usable(most));
      A sum = 0;
#pragma unroll
      for (int n = 0; n < S::kKeys; ++n) sum += score[h][n] = power_of_2(score[h][n] - usable(most));
      state.top[h] = most;
      state.sum[h] = state.sum[h] * decay + sum;
#pragma unroll
      for (int e = 0; e < S::kElements; ++e) state.total[h][e] *= decay;
    }
#pragma unroll
    for (int n = 0; n < S::kKeys; ++n) {
      A value[S::kElements];
      widen_row(value, v[n]);
#pragma unroll
      for (int h = 0; h < S::kHeads; ++h) {
#pragma unroll
        for (int e = 0; e < S::kElements; ++e) state.total[h][e] += score[h][n] * value[e];
      }
    }
  }

  // Keys begin .. end of the warp's longest row; its shortest has `least`.
  __device__ void steps(State& state, int begin, int end, int least) {
    for (; begin + S::kStep <= min(end, least); begin += S::kStep) step<true>(state, begin);
    for (; begin < end; begin += S::kStep) step<false>(state, begin);
  }

  __device__ void run(State& state) {
    state.clear();
    int most = list.count, least = list.count;
    if constexpr (S::kApart) {
#pragma unroll
      for (int distance = S::kLanes; distance < 32; distance *= 2) {
        most = max(most, __shfl_xor_sync(~0u, most, distance)), least = min(least, __shfl_xor_sync(~0u, least, distance));
      }
    }
    if constexpr (S::kFolds) {
      for (int begin = 0; begin < most; begin += S::kFold) {
        State part;
        part.clear();
        steps(part, begin, min(begin + S::kFold, most), least);
        state.join(part);
      }
    } else {
      steps(state, 0, most, least);
    }
    if constexpr (!S::kApart) {
#pragma unroll
      for (int distance = S::kLanes; distance < 32; distance *= 2) state.join_lane(distance);
    }
  }
};

}  // namespace
}  // namespace sparse_attention::gather
