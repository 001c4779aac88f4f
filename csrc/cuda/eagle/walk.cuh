// A walk down one tree's links by one block, and what it leaves. Every node's choice among its children is made at once.
#pragma once
#include "device.cuh"
#include "eagle.h"

namespace sparse_attention::eagle {

// Of one request, in shared memory. A link out of range is -1.
struct Walk {
  int64_t *token, *target;  // [nodes]; target: what the node wants its child to hold
  int *first, *next;        // [nodes]
  int *chosen, *steps;      // [nodes], the first child that holds the target or -1, and the children looked at
  int* path;                // [nodes + 1]

  static __host__ __device__ size_t size(int nodes) { return size_t(nodes) * (2 * sizeof(int64_t) + 4 * sizeof(int)) + sizeof(int) * (nodes + 1); }
  __device__ Walk(void* memory, int nodes) : token(static_cast<int64_t*>(memory)), target(token + nodes) {
    first = reinterpret_cast<int*>(target + nodes);
    next = first + nodes, chosen = next + nodes, steps = chosen + nodes, path = steps + nodes;
  }

  __device__ void load(const WalkIn& in, int b) const {
    const auto link = [&](int64_t to) { return to >= 0 && to < in.nodes ? int(to) : -1; };
    for (int n = threadIdx.x; n < in.nodes; n += blockDim.x) {
      const int64_t at = int64_t{b} * in.nodes + n;
      token[n] = in.draft_tokens[at], first[n] = link(in.first_child[at]), next[n] = link(in.next_sibling[at]);
    }
  }
  __device__ void choose(int nodes) const {
    for (int n = threadIdx.x; n < nodes; n += blockDim.x) {
      int found = -1, count = 0;
      for (int child = first[n]; child >= 0 && count < nodes && found < 0; child = next[child]) {
        ++count;
        if (token[child] == target[n]) found = child;
      }
      chosen[n] = found, steps[n] = count;
    }
  }
  // By one thread. All walks of a request look at `nodes` children at most. Returns the nodes of the path.
  __device__ int follow(int nodes, int columns) const {
    int node = 0, length = 1, used = 0;
    path[0] = 0;
    while (length < columns && chosen[node] >= 0 && used + steps[node] <= nodes) {
      used += steps[node];
      path[length++] = node = chosen[node];
    }
    return length;
  }
};

// Writes request b's results but sample_p, by all threads, after a barrier: path [length] and next_token are the same for all.
__device__ inline void finish(const WalkIn& in, const WalkOut& out, int b, const int64_t* token, const int* path, int length,
                              int64_t next_token) {
  __shared__ int row;
  const int thread = threadIdx.x, threads = blockDim.x, last = path[length - 1];
  int64_t* predicts = out.predicts + int64_t{b} * in.nodes;
  for (int n = thread; n < in.nodes; n += threads) predicts[n] = -1;
  for (int j = thread; j < out.columns; j += threads) out.accept_index[int64_t{b} * out.columns + j] = j < length ? path[j] : -1;
  if (thread == 0) row = in.retrieve_rows;
  __syncthreads();
  if (thread == 0) {  // in order: links that are no tree may lead to a node twice
    for (int j = 0; j + 1 < length; ++j) predicts[path[j]] = token[path[j + 1]];
    predicts[last] = next_token;
    out.next_token[b] = next_token;
    out.accept_length[b] = length - 1;
  }
  if (!out.best_candidate) return;
  const int64_t* rows = in.retrieve + int64_t{b} * in.retrieve_rows * in.retrieve_columns;
  if (length <= in.retrieve_columns)
    for (int r = thread; r < in.retrieve_rows; r += threads)
      if (rows[int64_t{r} * in.retrieve_columns + length - 1] == last) atomicMin(&row, r);
  __syncthreads();
  if (thread == 0) out.best_candidate[b] = row < in.retrieve_rows ? row : 0;
}

}  // namespace sparse_attention::eagle
