// A draft step: log-softmax and the best tokens of each row in two passes over it, and the best of all continuations. A block a row.
#include <algorithm>

#include "rank.cuh"
#include "eagle.h"

namespace sparse_attention::eagle {
namespace {

constexpr int kThreads = 1024;  // at most

template <class T>
using Acc = decltype(widen(T()));

// What was chosen, in any order, in shared memory.
template <class Key>
struct Chosen {
  Key key[kMostBest];
  int index[kMostBest];
  int count;
};

// write(rank, key, index) for the k best of the chosen.
template <class Key, class Write>
__device__ void ranked(const Chosen<Key>& chosen, int count, int k, const Write& write) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const Key key = chosen.key[i];
    const int index = chosen.index[i];
    int rank = 0;
    for (int j = 0; j < count; ++j) rank += chosen.key[j] > key || (chosen.key[j] == key && chosen.index[j] < index);
    if (rank < k) write(rank, key, index);
  }
}

// Infinity counts as minus infinity too.
template <class A>
__device__ __forceinline__ auto clean_key(A x) {
  const auto key = key_of(x);
  constexpr A infinity = A(__builtin_huge_val());
  return key == key_of(infinity) ? key_of(-infinity) : key;
}

// act(i, x) for this thread's elements of a row; aligned: 16 bytes at a time.
template <class T, class Act>
__device__ __forceinline__ void for_elements(const T* row, int count, bool aligned, const Act& act) {
  if constexpr (sizeof(T) < 8) {
    if (aligned) {
      constexpr int kHalves = 4 / int(sizeof(T)), kVector = 4 * kHalves;
      const uint4* from = reinterpret_cast<const uint4*>(row);
#pragma unroll 4
      for (int i = threadIdx.x; i < count / kVector; i += blockDim.x) {
        const uint4 x = from[i];
        const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int w = 0; w < 4; ++w)
#pragma unroll
          for (int half = 0; half < kHalves; ++half) act(i * kVector + w * kHalves + half, element_of<T>(words[w], half));
      }
      return;
    }
  }
  for (int i = threadIdx.x; i < count; i += blockDim.x) act(i, widen(row[i]));
}

__device__ __forceinline__ float exponential(float x) { return exp2f(x * 1.4426950408889634f); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// Over all threads, in an order of its own.
__device__ double block_sum(double x) {
  __shared__ double sums[32];
  for (int mask = 16; mask; mask /= 2) x += __shfl_xor_sync(kEveryLane, x, mask);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0;
  for (int w = 0; w < int(blockDim.x / 32); ++w) total += sums[w];
  return total;
}

template <class T>
__global__ void __launch_bounds__(kThreads) logsoftmax_kernel(const T* logits, int vocab, int k, bool aligned, const int64_t* d2t, T* values,
                                                              int64_t* tokens) {
  using A = Acc<T>;
  using Key = KeyOf<T>;
  __shared__ Chosen<Key> chosen;
  const T* row = logits + int64_t{blockIdx.x} * vocab;
  Key own = 0;
  for_elements(row, vocab, aligned, [&](int, A x) { own = max(own, clean_key(x)); });
  const Key most = block_max(own);
  // At least k elements reach the k-th largest of the threads' own maxima, and few more do.
  const Key bound = best<Key>(blockDim.x, k, [own](int) { return own; }).least;
  if (threadIdx.x == 0) chosen.count = 0;
  __syncthreads();
  const A top = value_of(most), lowest = value_of(clean_key(A(__builtin_huge_val())));
  A sum = 0;
  for_elements(row, vocab, aligned, [&](int i, A x) {
    const Key key = clean_key(x);
    if (top > lowest) sum += exponential(value_of(key) - top);
    if (key < bound) return;
    const int at = atomicAdd(&chosen.count, 1);
    if (at < kMostBest) chosen.key[at] = key, chosen.index[at] = i;
  });
  const double total = block_sum(sum);
  __syncthreads();
  int count = chosen.count;
  if (count > kMostBest) {  // too many are equal, or k is large
    const auto key_at = [row](int i) { return clean_key(widen(row[i])); };
    for_each_kept(vocab, best<Key>(vocab, k, key_at), key_at, [&](int n, int i) { chosen.key[n] = key_at(i), chosen.index[n] = i; });
    __syncthreads();
    count = k;
  }
  const double shift = double(top) + log(total);
  ranked(chosen, count, k, [&](int rank, Key key, int token) {
    const int64_t at = int64_t{blockIdx.x} * k + rank;
    narrow(top > lowest ? A(double(value_of(key)) - shift) : lowest, values + at);
    tokens[at] = d2t ? token + d2t[token] : token;
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) cumulative_kernel(Frontier f) {
  using A = Acc<T>;
  using Key = KeyOf<T>;
  __shared__ Chosen<Key> chosen;
  const int64_t b = blockIdx.x;
  const int count = f.rows * f.width;
  const T *log_probs = static_cast<const T*>(f.log_probs) + b * count, *scores = static_cast<const T*>(f.scores) + b * f.rows;
  T* cumulative = static_cast<T*>(f.cumulative) + b * count;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const A x = widen(log_probs[i]) + widen(scores[i / f.width]);
    narrow(x == x ? x : value_of(key_of(x)), cumulative + i);
  }
  const auto key_at = [cumulative](int i) { return key_of(widen(cumulative[i])); };  // of a thread's own elements
  for_each_kept(count, best<Key>(count, f.k, key_at), key_at, [&](int n, int i) { chosen.key[n] = key_at(i), chosen.index[n] = i; });
  __syncthreads();
  ranked(chosen, f.k, f.k, [&](int rank, Key, int i) {
    const int64_t at = b * f.k + rank;
    static_cast<T*>(f.best)[at] = cumulative[i];
    f.index[at] = i;
    f.index_rows[at] = i / f.width;
    if (f.chosen) f.chosen[at] = f.tokens[b * count + i];
    if (f.parents) f.parents[at] = i + f.first_parent;
  });
}

int threads_for(int items) { return std::clamp((items + 31) / 32 * 32, 128, kThreads); }

template <class Run>
int by_type(Dtype dtype, Run run) {
  switch (dtype) {
    case Dtype::f32: return run(static_cast<float*>(nullptr));
    case Dtype::f64: return run(static_cast<double*>(nullptr));
    case Dtype::bf16: return run(static_cast<BFloat16*>(nullptr));
    default: return run(static_cast<Float16*>(nullptr));
  }
}

}  // namespace

int logsoftmax_topk(Dtype dtype, const void* logits, int rows, int vocab, int k, const int64_t* d2t, void* values, int64_t* tokens,
                    void* stream) {
  return by_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool aligned = int64_t{vocab} * int64_t{sizeof(T)} % 16 == 0 && reinterpret_cast<uintptr_t>(logits) % 16 == 0;
    return launch(logsoftmax_kernel<T>, rows, threads_for(vocab), 0, stream, static_cast<const T*>(logits), vocab, k, aligned, d2t,
                  static_cast<T*>(values), tokens);
  });
}

int cumulative_topk(Dtype dtype, const Frontier& f, void* stream) {
  return by_type(dtype, [&](auto* type) {
    return launch(cumulative_kernel<std::remove_pointer_t<decltype(type)>>, f.batch, threads_for(f.rows * f.width), 0, stream, f);
  });
}

}  // namespace sparse_attention::eagle
