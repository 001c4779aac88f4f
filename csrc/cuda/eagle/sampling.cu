// Verification by coins, a block a request. All threads take every decision alike, in double; a row of probabilities is summed in full where
// a child was rejected and at the end.
#include <algorithm>

#include "rank.cuh"
#include "walk.cuh"

namespace sparse_attention::eagle {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kMostSegments = 2048;  // of a row, each summed by a warp

// Numbers 4 * block .. of request b: Philox4x32-10 (Salmon et al. 2011), key seed, counter (offset, b, block).
__device__ void uniforms(int64_t seed, int64_t offset, int b, int block, double out[4]) {
  uint32_t c[4] = {uint32_t(offset), uint32_t(uint64_t(offset) >> 32), uint32_t(b), uint32_t(block)};
  uint32_t low = uint32_t(seed), high = uint32_t(uint64_t(seed) >> 32);
  for (int round = 0; round < 10; ++round, low += 0x9E3779B9u, high += 0xBB67AE85u) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c[0]), low0 = 0xD2511F53u * c[0];
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c[2]), low1 = 0xCD9E8D57u * c[2];
    c[0] = high1 ^ c[1] ^ low, c[1] = low1, c[2] = high0 ^ c[3] ^ high, c[3] = low0;
  }
  for (int i = 0; i < 4; ++i) out[i] = (c[i] >> 8) * (1.0 / 16777216);
}

__device__ __forceinline__ double clamped(double coin) { return coin < 1.0 ? max(coin, 0.0) : 1.0 - 1.0 / 16777216; }
__device__ __forceinline__ double usable(double p) { return p > 0 && p < __builtin_huge_val() ? p : 0.0; }

// Of one request, in shared memory.
struct Memory {
  int64_t* token;           // [nodes]
  double *coins, *chance;   // [nodes + 1], [nodes]: of the children
  double* sums;             // [segments]
  int *first, *next, *children, *path;  // [nodes], path [nodes + 1]

  static __host__ __device__ size_t size(int nodes, int segments) {
    return sizeof(double) * (3 * size_t(nodes) + 1 + segments) + sizeof(int) * (4 * size_t(nodes) + 1);
  }
  __device__ Memory(void* memory, int nodes, int segments) : token(static_cast<int64_t*>(memory)) {
    coins = reinterpret_cast<double*>(token + nodes), chance = coins + nodes + 1, sums = chance + nodes;
    first = reinterpret_cast<int*>(sums + segments), next = first + nodes, children = next + nodes, path = children + nodes;
  }
};

template <class T>
struct Row {
  const T* p;
  int vocab, length, segments;  // length: of a segment
  const Memory& memory;
  int rejected;  // the tokens of so many children are left out

  __device__ double at(int64_t token) const { return token >= 0 && token < vocab ? usable(widen(p[token])) : 0.0; }
  __device__ double left(int token) const {
    for (int j = 0; j < rejected; ++j)
      if (memory.token[memory.children[j]] == token) return 0;
    return at(token);
  }
  // Sums every segment.
  __device__ double sum() const {
    const int lane = threadIdx.x % 32;
    __syncthreads();
    for (int s = threadIdx.x / 32; s < segments; s += kWarps) {
      const int start = s * length, stop = min(vocab, start + length);
      bool gap = false;
      for (int j = lane; j < rejected; j += 32) {
        const int64_t token = memory.token[memory.children[j]];
        gap = gap || (token >= start && token < stop);
      }
      gap = __any_sync(kEveryLane, gap);
      double total = 0;
      if (gap) {
        for (int i = start + lane; i < stop; i += 32) total += left(i);
      } else {
#pragma unroll 8
        for (int i = start + lane; i < stop; i += 32) total += usable(widen(p[i]));
      }
      for (int mask = 16; mask; mask /= 2) total += __shfl_xor_sync(kEveryLane, total, mask);
      if (lane == 0) memory.sums[s] = total;
    }
    __syncthreads();
    double total = 0;
    for (int s = 0; s < segments; ++s) total += memory.sums[s];
    return total;
  }
  // By one warp: the first token whose cumulative sum is more than coin * total, by the sums that `sum` left; 0 without any probability.
  __device__ int draw(double coin, double total) const {
    const double goal = coin * total;
    double before = 0;
    int segment = -1;
    bool inside = false;
    for (int s = 0; s < segments && !inside; ++s) {
      if (memory.sums[s] == 0) continue;
      segment = s;
      inside = before + memory.sums[s] > goal;
      if (!inside) before += memory.sums[s];
    }
    if (segment < 0) return 0;
    const int lane = threadIdx.x % 32, start = segment * length, stop = min(vocab, start + length);
    int last = start;
    for (int i = start; i < stop; i += 32) {
      const double own = i + lane < stop ? left(i + lane) : 0.0;
      double reached = own;
      for (int step = 1; step < 32; step *= 2) {
        const double other = __shfl_up_sync(kEveryLane, reached, step);
        if (lane >= step) reached += other;
      }
      const unsigned found = __ballot_sync(kEveryLane, inside && own > 0 && before + reached > goal);
      if (found) return i + __ffs(found) - 1;
      const unsigned some = __ballot_sync(kEveryLane, own > 0);
      if (some) last = i + 31 - __clz(some);
      before += __shfl_sync(kEveryLane, reached, 31);
    }
    return last;  // rounding left the goal at the very end
  }
};

// The child that is accepted, or -1; `visited`: how many children were looked at. All threads alike; the barriers in `sum` are for all.
template <class T>
__device__ int decide(const Row<T>& row, const Coins& numbers, int node, int children, int* used, int* visited) {
  const Memory& m = row.memory;
  double left = 1, tried = 0, whole = -1;
  for (int i = 0; i < children; ++i) {
    const int64_t token = m.token[m.children[i]];
    const double chance = m.chance[i];
    *visited = i + 1;
    if (numbers.target_only) {
      tried += chance;
      const bool known = token >= 0 && token < row.vocab;
      if ((chance > 0 && m.coins[node] <= tried / max(numbers.threshold_acc, 1e-9)) || (known && chance >= numbers.threshold_single))
        return m.children[i];
      continue;
    }
    bool again = false;  // an earlier child, rejected, held the token
    for (int j = 0; j < i && !again; ++j) again = m.token[m.children[j]] == token;
    if (again) continue;
    const double coin = m.coins[(*used)++];
    if (chance > 0 && coin <= chance / left) return m.children[i];
    tried += chance;
    if (i + 1 == children) break;
    if (whole < 0) whole = row.sum();
    left = whole - tried;
    if (left <= 0) break;
  }
  return -1;
}

template <class T>
__global__ void __launch_bounds__(kThreads) sampling_kernel(WalkIn in, const T* probs, int vocab, int segments, Coins numbers, WalkOut out) {
  __shared__ int shared_count, shared_token;
  const int b = blockIdx.x, thread = threadIdx.x, nodes = in.nodes;
  const Memory m(dynamic_shared<void*>(), nodes, segments);
  const int64_t base = int64_t{b} * nodes;
  const auto link = [&](int64_t to) { return to >= 0 && to < nodes ? int(to) : -1; };
  for (int n = thread; n < nodes; n += kThreads) {
    m.token[n] = in.draft_tokens[base + n], m.first[n] = link(in.first_child[base + n]), m.next[n] = link(in.next_sibling[base + n]);
    if (numbers.coins) m.coins[n] = clamped(numbers.coins[base + n]);
  }
  if (numbers.coins) {
    if (thread == 0) m.coins[nodes] = clamped(numbers.final_coins[b]);
  } else {
    for (int block = thread; block * 4 <= nodes; block += kThreads) {
      double four[4];
      uniforms(*numbers.seed, *numbers.offset, b, block, four);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (block * 4 + i <= nodes) m.coins[block * 4 + i] = four[i];
    }
  }
  if (thread == 0) m.path[0] = 0;
  __syncthreads();

  Row<T> row{probs + base * vocab, vocab, (vocab + segments - 1) / segments, segments, m, 0};
  int node = 0, length = 1, used = 0, steps = 0, rejected = 0;
  while (length < out.columns) {
    if (thread == 0) {
      int count = 0;
      for (int child = m.first[node]; child >= 0 && steps + count < nodes; child = m.next[child]) m.children[count++] = child;
      shared_count = count;
    }
    __syncthreads();
    const int children = shared_count;
    for (int i = thread; i < children; i += kThreads) m.chance[i] = row.at(m.token[m.children[i]]);
    __syncthreads();
    int visited = 0;
    const int child = decide(row, numbers, node, children, &used, &visited);
    steps += visited;
    rejected = child < 0 ? visited : 0;
    if (child < 0) break;
    __syncthreads();
    if (thread == 0) m.path[length] = child;
    ++length;
    node = child;
    row.p = probs + (base + node) * vocab;
  }
  row.rejected = rejected;
  double total = row.sum();
  const bool rest = rejected > 0 && total > 0;
  if (rejected > 0 && !rest) {
    row.rejected = 0;
    total = row.sum();
  }
  if (thread < 32) {
    const int token = row.draw(m.coins[nodes], total);
    if (thread == 0) shared_token = token;
  }
  __syncthreads();
  finish(in, out, b, m.token, m.path, length, shared_token);
  if (!out.sample_p) return;
  T* sample = static_cast<T*>(out.sample_p) + int64_t{b} * vocab;
  for (int i = thread; i < vocab; i += kThreads) {
    if (rest)
      narrow(decltype(widen(T()))(row.left(i) / total), sample + i);
    else
      sample[i] = row.p[i];
  }
}

int segments_of(int64_t vocab) { return int(std::min<int64_t>((vocab + 1023) / 1024, kMostSegments)); }

template <class T>
int sample(const WalkIn& in, const void* probs, int vocab, const Coins& numbers, const WalkOut& out, void* stream) {
  const int segments = segments_of(vocab);
  return launch(sampling_kernel<T>, in.batch, kThreads, Memory::size(in.nodes, segments), stream, in, static_cast<const T*>(probs), vocab,
                segments, numbers, out);
}

}  // namespace

int verify_sampling(const WalkIn& in, Dtype dtype, const void* probs, int vocab, const Coins& numbers, const WalkOut& out, void* stream) {
  switch (dtype) {
    case Dtype::f32: return sample<float>(in, probs, vocab, numbers, out, stream);
    case Dtype::f64: return sample<double>(in, probs, vocab, numbers, out, stream);
    case Dtype::bf16: return sample<BFloat16>(in, probs, vocab, numbers, out, stream);
    default: return sample<Float16>(in, probs, vocab, numbers, out, stream);
  }
}

int most_nodes_of_a_sample() {
  int nodes = 1024;
  while (Memory::size(nodes + 64, kMostSegments) <= kMostShared) nodes += 64;
  return nodes;
}

}  // namespace sparse_attention::eagle
