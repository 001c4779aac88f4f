// One warp takes one query row, for one head or for several that share their keys. Its lanes stand in groups; a group takes one key at
// a time, each lane 16 bytes of it (or several times 16), and keeps a softmax of its own. At the end the groups join theirs.
// Where rows are short, each group takes a row of its own instead, and nothing is joined.
//
// Rows longer than `longest` are cut into pieces, which leave their softmax in memory; `join_pieces` reads it. The order of all
// sums depends on the table alone, so repeats give equal bits.
#pragma once
#include "gather.h"
#include "walk.cuh"

namespace sparse_attention::gather {
namespace {

constexpr int kWarps = 4;  // neighbouring rows, whose keys are often the same or neighbours: they meet in the L1 cache

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

}  // namespace
}  // namespace sparse_attention::gather
