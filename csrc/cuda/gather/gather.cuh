// One warp takes one query row, for one head or for several that share their keys. Its lanes stand in groups; a group takes one key at
// a time, each lane 16 bytes of it (or several times 16), and keeps a softmax of its own. At the end the groups join theirs.
// Where rows are short, each group takes a row of its own instead, and nothing is joined.
//
// Rows longer than `longest` are cut into pieces, which leave their softmax in memory; `join_pieces` reads it. The order of all
// sums depends on the table alone, so repeats give equal bits.
#pragma once
#include "gather.h"
#include "softmax.cuh"

namespace sparse_attention::gather {
namespace {

constexpr int kWarps = 4;  // neighbouring rows, whose keys are often the same or neighbours: they meet in the L1 cache

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
  static constexpr int kBlocks = kHeads > 1 || sizeof(T) == 8 || !kAligned ? 2 : kElements > 8 ? 3 : 4;
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

template <typename T>
__device__ inline T* row_of(const Strided& x, int batch, int head, int row) {
  return static_cast<T*>(x.data) + batch * x.batch + head * x.head + row * x.row;
}

// One row, or one of each group, from the first keys in `ahead` on. piece: where its softmax goes, or -1: it is a whole row. A row that
// is not `real` is read, but not written.
template <class S>
__device__ inline void take(const Forward& f, int batch, int head, int row, const List& list, const Ahead<S>& ahead, int piece, bool real) {
  using T = typename S::T;
  using A = typename S::A;
  const int lane = threadIdx.x % 32, first = lane % S::kLanes * S::kPer;
  bool mine[S::kChunks];
#pragma unroll
  for (int c = 0; c < S::kChunks; ++c) mine[c] = first + c * S::kLanes * S::kPer < f.head_dim;
  A q[S::kHeads][S::kElements];
#pragma unroll
  for (int h = 0; h < S::kHeads; ++h) {
    uint4 chunks[S::kChunks];
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) {
      chunks[c] = make_uint4(0, 0, 0, 0);
      if (mine[c]) chunks[c] = fetch<T, S::kAligned>(row_of<T>(f.q, batch, head + h, row) + first + c * S::kLanes * S::kPer);
    }
    Walk<S>::widen_row(q[h], chunks);
  }
  const int kv_head = head / (f.heads / f.kv_heads);
  const Source from{reinterpret_cast<const char*>(row_of<T>(f.k, batch, kv_head, 0) + first),
                    reinterpret_cast<const char*>(row_of<T>(f.v, batch, kv_head, 0) + first),
                    uint32_t(f.k.row * sizeof(T)), uint32_t(f.v.row * sizeof(T)), lane / S::kLanes};
  typename S::State state;
  Walk<S>{from, list, q, mine, A(f.scale * kLog2e), ahead}.run(state);

  if (!real || (!S::kApart && lane >= S::kLanes)) return;
  const bool leads = lane % S::kLanes == 0;
#pragma unroll
  for (int h = 0; h < S::kHeads; ++h) {
    if (piece < 0) {
      if (leads) static_cast<A*>(f.lse)[(int64_t(batch) * f.heads + head + h) * f.q_len + row] = state.lse(h);
    } else if (leads) {
      A* ends = static_cast<A*>(f.partial) + int64_t(f.batch) * f.n_pieces * S::kHeads * f.head_dim;
      A* to = ends + 2 * ((int64_t(batch) * f.n_pieces + piece) * S::kHeads + h);
      to[0] = state.top[h], to[1] = state.sum[h];
    }
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) {
      if (!mine[c]) continue;
      const int at = first + c * S::kLanes * S::kPer;
      A part[S::kPer];
#pragma unroll
      for (int e = 0; e < S::kPer; ++e) part[e] = state.total[h][c * S::kPer + e];
      if (piece < 0) {
        put<S::kAligned>(row_of<T>(f.out, batch, head + h, row) + at, part, state.inverse(h));
      } else {
        A* to = static_cast<A*>(f.partial) + ((int64_t(batch) * f.n_pieces + piece) * S::kHeads + h) * f.head_dim + at;
#pragma unroll
        for (int e = 0; e < S::kPer; ++e) to[e] = part[e];
      }
    }
  }
}

// The lists of one head's rows. What is wanted of a row is asked for two turns ahead, its first keys one turn ahead.
struct Reader {
  const Forward& f;
  const int64_t* row_start;
  int64_t start, stop;  // of the row asked for

  __device__ void ask(int row) {
    row = min(row, f.q_len - 1);
    start = __ldg(row_start + row), stop = __ldg(row_start + row + 1);
  }

  // real: whether that row is one of these: neither past the last nor cut into pieces.
  __device__ List answer(int row, bool& real) const {
    real = row < f.q_len && stop - start <= f.longest;
    return {f.columns + start, real ? int(stop - start) : 0};
  }
};

// The first blocks take the pieces of long rows, which last longest; the others each take kWarps * kRows rows at a time, `turns` times.
template <class S>
__global__ void __launch_bounds__(32 * kWarps, S::kBlocks) rows(const __grid_constant__ Forward f, int piece_blocks, int turns) {
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / S::kLanes;
  constexpr int kTurn = kWarps * S::kRows;  // rows
  Ahead<S> ahead, next_ahead;
  if (int(blockIdx.x) < piece_blocks) {
    const int number = blockIdx.x * kWarps + warp;
    if (S::kApart || number >= f.batch * f.n_pieces) return;
    const int batch = number / f.n_pieces, n = number % f.n_pieces;
    const Piece piece = f.pieces[n];
    const int64_t start = f.row_start[int64_t(f.head_variant[piece.head]) * f.q_len + piece.row];
    const List list{f.columns + start + piece.first, piece.count};
    ahead.read(list, 0, group);
    take<S>(f, batch, piece.head, piece.row, list, ahead, n, true);
    return;
  }
  const unsigned block = blockIdx.x - piece_blocks, rows_a_block = kTurn * turns;
  const unsigned blocks_a_head = (f.q_len + rows_a_block - 1) / rows_a_block, heads = f.heads / S::kHeads;
  const unsigned sequence = block / blocks_a_head;
  const int head = sequence % heads * S::kHeads, batch = sequence / heads;
  int row = block % blocks_a_head * rows_a_block + warp * S::kRows + (S::kApart ? group : 0);
  Reader reader{f, f.row_start + int64_t(f.head_variant[head]) * f.q_len};
  bool real, next_real;
  reader.ask(row);
  List list = reader.answer(row, real);
  ahead.read(list, 0, group);
  reader.ask(row + kTurn);
  for (;; row += kTurn) {
    const List next = reader.answer(row + kTurn, next_real);
    next_ahead.read(next, 0, group);
    reader.ask(row + 2 * kTurn);
    take<S>(f, batch, head, min(row, f.q_len - 1), list, ahead, -1, real);
    if (--turns == 0) return;
    list = next, ahead = next_ahead, real = next_real;
  }
}

// One warp joins 32 elements of the pieces of one row of one head, 32 pieces at a time.
template <typename T>
__global__ void __launch_bounds__(32 * kWarps, 8) join_pieces(const __grid_constant__ Forward f) {
  using A = typename Accumulator<T>::Type;
  const int lane = threadIdx.x % 32, parts = (f.head_dim + 31) / 32;
  int number = blockIdx.x * kWarps + threadIdx.x / 32;
  const int element = number % parts * 32 + lane;
  const int h = (number /= parts) % f.together;
  const int n = (number /= f.together) % f.n_splits, batch = number / f.n_splits;
  if (batch >= f.batch) return;
  const Split split = f.splits[n];
  const int64_t first = (int64_t(batch) * f.n_pieces + split.first_piece) * f.together + h;
  const A* totals = static_cast<const A*>(f.partial) + first * f.head_dim + element;
  const A* ends = static_cast<const A*>(f.partial) + int64_t(f.batch) * f.n_pieces * f.together * f.head_dim + 2 * first;
  const bool mine = element < f.head_dim;

  Softmax<A, 1, 1> whole;
  whole.clear();
  A& top = whole.top[0];
  for (int piece = lane; piece < split.pieces; piece += 32) top = larger(top, ends[2 * piece * f.together]);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) top = larger(top, __shfl_xor_sync(~0u, top, distance));

  for (int begin = 0; begin < split.pieces; begin += 32) {
    const int some = min(32, split.pieces - begin);
    A weight = 0, share = 0;
    if (lane < some) {
      const A* end = ends + 2 * (begin + lane) * f.together;
      weight = power_of_2(end[0] - usable(top)), share = end[1] * weight;
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) share += __shfl_xor_sync(~0u, share, distance);
    whole.sum[0] += share;
    A part = 0;
#pragma unroll 8
    for (int piece = 0; piece < some; ++piece) {
      const A factor = __shfl_sync(~0u, weight, piece);
      if (mine) part += factor * totals[int64_t(begin + piece) * f.together * f.head_dim];
    }
    whole.total[0][0] += part;
  }

  if (element == 0) static_cast<A*>(f.lse)[(int64_t(batch) * f.heads + split.head + h) * f.q_len + split.row] = whole.lse(0);
  if (mine) row_of<T>(f.out, batch, split.head + h, split.row)[element] = narrow(whole.total[0][0] * whole.inverse(0), T());
}

}  // namespace
}  // namespace sparse_attention::gather
