// From candidates or parents to trees, one launch each: a block a request, or a few that share the rows of a large tree.
#include <algorithm>

#include "tree.cuh"

namespace sparse_attention::eagle {
namespace {

constexpr int kThreads = 1024;     // at most
constexpr int kRowsOfABlock = 64;  // about, of a tree that several blocks write
constexpr int kMaskThreads = 256;

template <class T, class Keep>
__device__ void select_into(const T* scores, int count, int total, const Keep& keep) {
  const auto key_at = [scores](int i) { return key_of(widen(scores[i])); };
  for_each_kept(count, best<KeyOf<T>>(count, total, key_at), key_at, keep);
}

template <class T>
__global__ void __launch_bounds__(kThreads) select_kernel(const T* scores, int candidates, int total, int64_t* selected) {
  const int64_t b = blockIdx.x;
  select_into(scores + b * candidates, candidates, total, [&](int n, int f) { selected[b * total + n] = f; });
}

// Tokens, and parents as nodes: where the parent's index stands among the selected ones. chosen: [total] in shared memory.
__device__ void resolve(const Candidates& in, const int64_t* chosen, int* parent, int b, int total, bool whole) {
  const int siblings = in.count / in.rows;
  int64_t* draft_tokens = in.draft_tokens + int64_t{b} * (total + 1);
  for (int n = threadIdx.x; n < total; n += blockDim.x) {
    const int64_t own = chosen[n];
    const int place = int(max(int64_t{0}, min(own, int64_t{in.count} - 1)));
    if (whole) draft_tokens[n + 1] = in.tokens[int64_t{b} * in.count + place];
    const int64_t above = in.parents[int64_t{b} * in.rows + place / siblings];  // 1 + the parent's index; 0: the root
    int node = -1;
    if (above == 0) {
      node = 0;
    } else if (above > 0) {
      int low = 0, high = total;  // the first that is not less
      while (low < high) {
        const int middle = (low + high) / 2;
        if (chosen[middle] < above - 1)
          low = middle + 1;
        else
          high = middle;
      }
      if (low < n && chosen[low] == above - 1) node = low + 1;
    }
    parent[n + 1] = place == own ? node : -1;
  }
  if (threadIdx.x != 0) return;
  parent[0] = -1;
  if (whole) draft_tokens[0] = in.root_tokens[b];
}

// Shared memory of a block: nodes, indices of the selected, bits of the mask.
struct Layout {
  int64_t* chosen;
  int* nodes;
  uint32_t* bits;
  __device__ explicit Layout(int n) : chosen(dynamic_shared<int64_t>()) {
    nodes = reinterpret_cast<int*>(chosen + n);
    bits = reinterpret_cast<uint32_t*>(nodes + Nodes::kArrays * n);
  }
  static size_t size(int n) {
    return size_t(n) * (sizeof(int64_t) + Nodes::kArrays * sizeof(int)) + size_t{4} * words_of(n) * std::min(n, kMaskRows);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) build_kernel(const T* scores, Candidates in, TreeOut out, MaskOut mask, int blocks) {
  const int b = blockIdx.x / blocks, part = blockIdx.x % blocks, nodes = out.nodes, total = nodes - 1;
  const bool whole = part == 0;
  const Layout memory(nodes);
  const Nodes tree(memory.nodes, nodes);
  int64_t* selected = in.selected + int64_t{b} * total;
  if (scores) {
    select_into(scores + int64_t{b} * in.count, in.count, total, [&](int n, int f) {
      memory.chosen[n] = f;
      if (whole) selected[n] = f;
    });
  } else {
    for (int n = threadIdx.x; n < total; n += blockDim.x) memory.chosen[n] = selected[n];
  }
  __syncthreads();
  resolve(in, memory.chosen, tree.parent, b, total, whole);
  __syncthreads();
  const int begin = int(int64_t{nodes} * part / blocks), end = int(int64_t{nodes} * (part + 1) / blocks);
  fill_tree(tree, out, b, begin, end, whole);
  write_mask(tree.parent, memory.bits, mask, b, nodes, begin, end);
}

__device__ __forceinline__ int lower_or_none(int64_t parent, int n) { return parent >= 0 && parent < n ? int(parent) : -1; }

__global__ void __launch_bounds__(kThreads) assemble_kernel(const int64_t* parents, TreeOut out, MaskOut mask, int blocks) {
  const int b = blockIdx.x / blocks, part = blockIdx.x % blocks, nodes = out.nodes;
  const Layout memory(nodes);
  const Nodes tree(memory.nodes, nodes);
  for (int n = threadIdx.x; n < nodes; n += blockDim.x) tree.parent[n] = lower_or_none(parents[int64_t{b} * nodes + n], n);
  __syncthreads();
  const int begin = int(int64_t{nodes} * part / blocks), end = int(int64_t{nodes} * (part + 1) / blocks);
  fill_tree(tree, out, b, begin, end, part == 0);
  write_mask(tree.parent, memory.bits, mask, b, nodes, begin, end);
}

__global__ void __launch_bounds__(kMaskThreads) mask_kernel(const int64_t* parents, int nodes, MaskOut mask, int blocks) {
  const int b = blockIdx.x / blocks, part = blockIdx.x % blocks;
  const int begin = int(int64_t{nodes} * part / blocks), end = int(int64_t{nodes} * (part + 1) / blocks);
  int* parent = dynamic_shared<int>();
  for (int n = threadIdx.x; n < end; n += blockDim.x) parent[n] = lower_or_none(parents[int64_t{b} * nodes + n], n);
  __syncthreads();
  write_mask(parent, reinterpret_cast<uint32_t*>(parent + nodes), mask, b, nodes, begin, end);
}

int threads_for(int items) { return std::clamp((items + 31) / 32 * 32, 128, kThreads); }
int blocks_for(int nodes) { return std::max(1, nodes / kRowsOfABlock); }

constexpr int kMaskRowsOfABlock = 8;  // a warp each

size_t mask_shared(int nodes) { return sizeof(int) * nodes + size_t{4} * words_of(nodes) * std::min(nodes, kMaskRows); }

template <class Run>
int by_type(Dtype dtype, Run run) {
  switch (dtype) {
    case Dtype::f32: return run(static_cast<const float*>(nullptr));
    case Dtype::f64: return run(static_cast<const double*>(nullptr));
    case Dtype::bf16: return run(static_cast<const BFloat16*>(nullptr));
    default: return run(static_cast<const Float16*>(nullptr));
  }
}

template <class Size>
int most_within(Size size) {
  int nodes = 1024;
  while (size(nodes + 64) <= kMostShared) nodes += 64;
  return nodes;
}

}  // namespace

int select(Dtype dtype, const void* scores, int batch, int candidates, int total, int64_t* selected, void* stream) {
  return by_type(dtype, [&](auto* type) {
    return launch(select_kernel<std::remove_cv_t<std::remove_pointer_t<decltype(type)>>>, batch, threads_for(candidates), 0, stream,
                  static_cast<decltype(type)>(scores), candidates, total, selected);
  });
}

int build(const Candidates& in, const TreeOut& out, const MaskOut& mask, void* stream) {
  const int blocks = blocks_for(out.nodes), threads = threads_for(std::max(in.scores ? in.count : 0, out.nodes));
  return by_type(in.scores ? in.dtype : Dtype::f32, [&](auto* type) {
    return launch(build_kernel<std::remove_cv_t<std::remove_pointer_t<decltype(type)>>>, int64_t{out.batch} * blocks, threads,
                  Layout::size(out.nodes), stream, static_cast<decltype(type)>(in.scores), in, out, mask, blocks);
  });
}

int assemble(const int64_t* parents, const TreeOut& out, const MaskOut& mask, void* stream) {
  const int blocks = blocks_for(out.nodes);
  return launch(assemble_kernel, int64_t{out.batch} * blocks, threads_for(std::max(256, out.nodes)), Layout::size(out.nodes), stream, parents,
                out, mask, blocks);
}

int tree_mask(const int64_t* parents, int batch, int nodes, const MaskOut& mask, void* stream) {
  const int blocks = (nodes + kMaskRowsOfABlock - 1) / kMaskRowsOfABlock;
  return launch(mask_kernel, int64_t{batch} * blocks, kMaskThreads, mask_shared(nodes), stream, parents, nodes, mask, blocks);
}

int most_nodes_of_a_tree() { return most_within(Layout::size); }
int most_nodes_of_a_mask() { return most_within(mask_shared); }

}  // namespace sparse_attention::eagle
