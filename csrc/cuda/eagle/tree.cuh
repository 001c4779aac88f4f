// Everything of a tree that follows from its parents, by one block in shared memory.
#pragma once
#include "mask.cuh"
#include "rank.cuh"

namespace sparse_attention::eagle {

// Of one request, in shared memory; [nodes] each. parent: a lower node, or -1.
struct Nodes {
  static constexpr int kArrays = 7;
  int *parent, *depth, *first, *next, *row_leaf, *leaves, *before;

  __device__ Nodes(int* memory, int nodes)
      : parent(memory), depth(memory + nodes), first(memory + 2 * nodes), next(memory + 3 * nodes), row_leaf(memory + 4 * nodes),
        leaves(memory + 5 * nodes), before(memory + 6 * nodes) {}
};

// First child and next sibling, 32 nodes at a time from the last, by one warp; siblings ascend.
__device__ inline void link(const Nodes& tree, int nodes) {
  const int lane = threadIdx.x % 32;
  for (int n = lane; n < nodes; n += 32) tree.first[n] = -1;
  __syncwarp();
  for (int start = (nodes - 1) / 32 * 32; start >= 0; start -= 32) {
    const int n = start + lane, parent = n < nodes ? tree.parent[n] : -1;
    const unsigned siblings = __match_any_sync(kEveryLane, parent), later = siblings & ~1u << lane;
    const int next = parent < 0 ? -1 : later ? start + __ffs(later) - 1 : tree.first[parent];
    __syncwarp();
    if (n < nodes) tree.next[n] = next;
    if (parent >= 0 && (siblings & ((1u << lane) - 1)) == 0) tree.first[parent] = n;
    __syncwarp();
  }
}

// Fills `tree` from tree.parent and writes request b's fields; of the rows of paths [begin, end), the rest if `whole`.
__device__ inline void fill_tree(const Nodes& tree, const TreeOut& out, int b, int begin, int end, bool whole) {
  __shared__ int orphans, deepest;
  const int thread = threadIdx.x, threads = blockDim.x, nodes = out.nodes, columns = out.columns;
  if (thread == 0) orphans = deepest = 0;
  __syncthreads();
  int* top = tree.before;  // the root that a node hangs from, until the leaves are known
  for (int n = thread; n < nodes; n += threads) {
    int depth = 0, at = n;
    for (int above; (above = tree.parent[at]) >= 0; at = above) ++depth;
    tree.depth[n] = depth, top[n] = at, tree.leaves[n] = 0, tree.row_leaf[n] = -1;
    if (n > 0 && tree.parent[n] < 0) atomicAdd(&orphans, 1);
  }
  if (thread < 32) link(tree, nodes);
  __syncthreads();

  int leaf_count = 0;
  for (int start = 0; start < nodes; start += threads) {
    const int n = start + thread;
    const bool leaf = n < nodes && tree.first[n] < 0 && top[n] == 0;
    const Before before = count_before(leaf, false);
    if (leaf) {
      atomicMax(&deepest, tree.depth[n]);
      if (out.sorted)
        for (int at = n; at >= 0; at = tree.parent[at]) atomicAdd(tree.leaves + at, 1);
      else
        tree.row_leaf[leaf_count + before.first] = n;
    }
    leaf_count += before.all_first;
  }
  __syncthreads();
  if (out.sorted) {  // a leaf's row: the leaves below the earlier siblings of every node of its path
    for (int n = thread; n < nodes; n += threads) {
      int sum = 0;
      for (int child = tree.first[n]; child >= 0; child = tree.next[child]) {
        tree.before[child] = sum;
        sum += tree.leaves[child];
      }
    }
    __syncthreads();
    for (int n = thread; n < nodes; n += threads) {
      if (tree.first[n] >= 0 || tree.leaves[n] == 0) continue;
      int row = 0;
      for (int at = n; tree.parent[at] >= 0; at = tree.parent[at]) row += tree.before[at];
      tree.row_leaf[row] = n;
    }
    __syncthreads();
  }

  int64_t* rows = out.retrieve + int64_t{b} * nodes * columns;
  for (int i = begin * columns + thread; i < end * columns; i += threads) {
    const int leaf = tree.row_leaf[i / columns], column = i % columns;
    int node = leaf;
    if (leaf >= 0) {
      int depth = tree.depth[leaf];
      if (depth < column) node = -1;
      for (; depth > column; --depth) node = tree.parent[node];
    }
    rows[i] = node;
  }
  if (!whole) return;
  for (int n = thread; n < nodes; n += threads) {
    const int64_t at = int64_t{b} * nodes + n;
    out.parents[at] = tree.parent[n];
    out.depths[at] = tree.depth[n];
    out.first_child[at] = tree.first[n];
    out.next_sibling[at] = tree.next[n];
  }
  if (thread == 0) {
    out.leaf_count[b] = leaf_count;
    out.width[b] = deepest + 1;
    out.orphans[b] = orphans;
  }
}

}  // namespace sparse_attention::eagle
