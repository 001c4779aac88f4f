// Greedy verification in one launch: many blocks look for the best tokens of all nodes, the last block of a request walks its tree.
#include <algorithm>

#include "rank.cuh"
#include "tickets.cuh"
#include "walk.cuh"

namespace sparse_attention::eagle {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kLoads = 4;  // of 16 bytes, by each thread, all on their way at once
constexpr int kAtOnce = 8;  // nodes whose parts a warp of the last block gathers together

template <class T>
constexpr int kChunk = kThreads * kLoads * 16 / int(sizeof(T));  // elements of a block

// The best token of a stretch: the key of its logit, and the lowest token with it.
template <class Key>
struct alignas(2 * sizeof(Key)) Best {
  Key key, token;
};
template <class Key>
__device__ __forceinline__ bool better(const Best<Key>& a, const Best<Key>& b) {
  return a.key > b.key || (a.key == b.key && a.token < b.token);
}
__device__ __forceinline__ Best<uint32_t> load_best(const Best<uint32_t>* from) {
  const uint64_t both = load_shared_by_blocks(reinterpret_cast<const uint64_t*>(from));
  return {uint32_t(both), uint32_t(both >> 32)};
}
__device__ __forceinline__ Best<uint64_t> load_best(const Best<uint64_t>* from) {
  return {load_shared_by_blocks(&from->key), load_shared_by_blocks(&from->token)};
}

// The least token of all threads, in thread 0.
__device__ __forceinline__ unsigned block_min(unsigned token) {
  __shared__ unsigned tokens[kWarps];
  token = __reduce_min_sync(kEveryLane, token);
  if (threadIdx.x % 32 == 0) tokens[threadIdx.x / 32] = token;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) token = min(token, tokens[w]);
  return token;
}

constexpr unsigned kNoToken = ~0u;

// Two logits or one, all minus infinity.
template <class T>
constexpr uint32_t kLowestWord = sizeof(T) == 4 ? 0xff800000u : std::is_same_v<T, BFloat16> ? 0xff80ff80u : 0xfc00fc00u;

// Rows that begin at a multiple of 16 bytes, held in registers. The result is thread 0's.
template <class T>
__device__ Best<uint32_t> best_of_aligned(const T* row, int64_t vocab, int split) {
  constexpr int kHalves = 4 / int(sizeof(T)), kVector = 4 * kHalves;
  const int last = int(vocab / kVector) - 1, first = split * kThreads * kLoads + threadIdx.x;
  const auto place = [&](int u) { return min(first + u * kThreads, last); };  // past the end the last once more
  uint32_t words[kLoads][4], most = kLowestWord<T>;
#pragma unroll
  for (int u = 0; u < kLoads; ++u) {
    const uint4 x = load_once(reinterpret_cast<const uint4*>(row) + place(u));
    words[u][0] = x.x, words[u][1] = x.y, words[u][2] = x.z, words[u][3] = x.w;
  }
#pragma unroll
  for (int u = 0; u < kLoads; ++u)
#pragma unroll
    for (int w = 0; w < 4; ++w) most = word_max<T>(most, words[u][w]);
  uint32_t own = key_of(element_of<T>(most, 0));
  if (kHalves == 2) own = max(own, key_of(element_of<T>(most, 1)));
  const uint32_t key = block_max(own);
  unsigned token = kNoToken;
  if (own == key) {
#pragma unroll
    for (int u = 0; u < kLoads; ++u)
#pragma unroll
      for (int w = 0; w < 4; ++w)
#pragma unroll
        for (int half = 0; half < kHalves; ++half)
          if (token == kNoToken && key_of(element_of<T>(words[u][w], half)) == key)
            token = unsigned(place(u)) * kVector + w * kHalves + half;
  }
  return {key, block_min(token)};
}

// Any rows.
template <class T>
__device__ Best<KeyOf<T>> best_of(const T* row, int64_t vocab, int split) {
  KeyOf<T> own = 0;
  unsigned token = kNoToken;
  const int64_t start = int64_t{split} * kChunk<T>, stop = min(vocab, start + kChunk<T>);
  for (int64_t i = start + threadIdx.x; i < stop; i += kThreads) {
    const KeyOf<T> key = key_of(widen(row[i]));
    if (key > own) own = key, token = unsigned(i);
  }
  const KeyOf<T> key = block_max(own);
  return {key, block_min(own == key ? token : kNoToken)};
}

// The best token of every node, from the bests of its stretches.
template <class Key>
__device__ void gather_targets(const Best<Key>* bests, int splits, int nodes, int64_t* target) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int start = warp; start < nodes; start += kWarps * kAtOnce) {
    Best<Key> found[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int n = start + u * kWarps;
      found[u] = n < nodes && lane < splits ? load_best(bests + int64_t{n} * splits + lane) : Best<Key>{0, 0};
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int n = start + u * kWarps;
      if (n >= nodes) break;
      Best<Key> own = found[u];
      for (int s = lane + 32; s < splits; s += 32) {
        const Best<Key> other = load_best(bests + int64_t{n} * splits + s);
        if (better(other, own)) own = other;
      }
      const Key key = warp_max(own.key);
      const unsigned token = __reduce_min_sync(kEveryLane, own.key == key ? unsigned(own.token) : kNoToken);
      if (lane == 0) target[n] = token;
    }
  }
}

// The walk of request b, whose targets other threads may still be writing. Returns the path's last node.
__device__ int walk_tree(const WalkIn& in, const WalkOut& out, int b, const Walk& walk) {
  __shared__ int length;
  __syncthreads();
  walk.choose(in.nodes);
  __syncthreads();
  if (threadIdx.x == 0) length = walk.follow(in.nodes, out.columns);
  __syncthreads();
  const int node = walk.path[length - 1];
  finish(in, out, b, walk.token, walk.path, length, walk.target[node]);
  return node;
}

// By all threads; `aligned`: a multiple of 16 bytes that begins at one, in both places.
template <class T>
__device__ void copy_row(const T* from, T* to, int64_t count, bool aligned) {
  if (aligned) {
    const int vectors = int(count * int(sizeof(T)) / 16);
#pragma unroll 8
    for (int i = threadIdx.x; i < vectors; i += kThreads) reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
  } else {
    for (int64_t i = threadIdx.x; i < count; i += kThreads) to[i] = from[i];
  }
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) greedy_kernel(WalkIn in, const T* logits, int64_t vocab, int splits, Best<KeyOf<T>>* bests, Tickets tickets,
                                                           WalkOut out) {
  __shared__ bool last;
  const int64_t row = blockIdx.x / splits;
  const int split = blockIdx.x % splits, b = int(row / in.nodes);
  Best<KeyOf<T>> found;
  if constexpr (kAligned)
    found = best_of_aligned(logits + row * vocab, vocab, split);
  else
    found = best_of(logits + row * vocab, vocab, split);
  if (threadIdx.x == 0) {
    bests[blockIdx.x] = found;
    last = is_last(tickets, b, unsigned(in.nodes) * splits);
  }
  __syncthreads();
  if (!last) return;
  const Walk walk(dynamic_shared<void*>(), in.nodes);
  walk.load(in, b);
  gather_targets(bests + int64_t{b} * in.nodes * splits, splits, in.nodes, walk.target);
  const int node = walk_tree(in, out, b, walk);
  if (!out.sample_p) return;
  T* sample = static_cast<T*>(out.sample_p);
  const bool aligned = kAligned && reinterpret_cast<uintptr_t>(sample) % 16 == 0;
  copy_row(logits + (int64_t{b} * in.nodes + node) * vocab, sample + b * vocab, vocab, aligned);
}

__global__ void __launch_bounds__(kThreads) tokens_kernel(WalkIn in, const int64_t* targets, WalkOut out) {
  const int b = blockIdx.x;
  const Walk walk(dynamic_shared<void*>(), in.nodes);
  walk.load(in, b);
  for (int n = threadIdx.x; n < in.nodes; n += blockDim.x) walk.target[n] = targets[int64_t{b} * in.nodes + n];
  walk_tree(in, out, b, walk);
}

int splits_of(Dtype dtype, int64_t vocab) {
  const int64_t bytes = dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2, chunk = kThreads * kLoads * 16 / bytes;
  return int((vocab + chunk - 1) / chunk);
}

template <class T>
int greedy(const WalkIn& in, const T* logits, Dtype dtype, int64_t vocab, const WalkOut& out, void* workspace, void* stream) {
  const int splits = splits_of(dtype, vocab);
  const int64_t blocks = int64_t{in.batch} * in.nodes * splits;
  auto* bests = static_cast<Best<KeyOf<T>>*>(workspace);
  Tickets tickets;
  if (const int error = take_tickets(in.batch, stream, reinterpret_cast<unsigned*>(bests + blocks), &tickets)) return error;
  const bool aligned = vocab * sizeof(T) % 16 == 0 && reinterpret_cast<uintptr_t>(logits) % 16 == 0;
  const size_t shared = Walk::size(in.nodes);
  if constexpr (sizeof(T) < 8)
    if (aligned) return launch(greedy_kernel<T, true>, blocks, kThreads, shared, stream, in, logits, vocab, splits, bests, tickets, out);
  return launch(greedy_kernel<T, false>, blocks, kThreads, shared, stream, in, logits, vocab, splits, bests, tickets, out);
}

}  // namespace

int64_t greedy_workspace(const WalkIn& in, Dtype dtype, int64_t vocab) {
  return int64_t{in.batch} * in.nodes * splits_of(dtype, vocab) * int64_t{sizeof(Best<uint64_t>)} + int64_t{in.batch} * int64_t{sizeof(unsigned)};
}

int verify_greedy(const WalkIn& in, Dtype dtype, const void* logits, const int64_t* targets, int64_t vocab, const WalkOut& out, void* workspace,
                  void* stream) {
  if (targets) return launch(tokens_kernel, in.batch, kThreads, Walk::size(in.nodes), stream, in, targets, out);
  switch (dtype) {
    case Dtype::f32: return greedy(in, static_cast<const float*>(logits), dtype, vocab, out, workspace, stream);
    case Dtype::f64: return greedy(in, static_cast<const double*>(logits), dtype, vocab, out, workspace, stream);
    case Dtype::bf16: return greedy(in, static_cast<const BFloat16*>(logits), dtype, vocab, out, workspace, stream);
    default: return greedy(in, static_cast<const Float16*>(logits), dtype, vocab, out, workspace, stream);
  }
}

int most_nodes_of_a_walk() {
  int nodes = 1024;
  while (Walk::size(nodes + 64) <= kMostShared) nodes += 64;
  return nodes;
}

}  // namespace sparse_attention::eagle
