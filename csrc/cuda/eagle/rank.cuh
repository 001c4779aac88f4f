// Scores as integers of the same order, and the choice of the best by (score descending, index ascending), by all threads of a block.
#pragma once
#include "device.cuh"

namespace sparse_attention::eagle {

constexpr unsigned kEveryLane = 0xffffffffu;

// 1 at least. NaN counts as minus infinity and -0.0 as 0.0. On the bits: float arithmetic here flushes subnormal numbers.
__device__ __forceinline__ uint32_t key_of(float x) {
  uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) bits = 0xff800000u;
  if (bits == 0x80000000u) bits = 0;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ uint64_t key_of(double x) {
  constexpr uint64_t sign = uint64_t(1) << 63, infinity = 0x7ff0000000000000ull;
  uint64_t bits = bits_of(x);
  if ((bits & ~sign) > infinity) bits = sign | infinity;
  if (bits == sign) bits = 0;
  return bits & sign ? ~bits : bits | sign;
}

__device__ __forceinline__ float value_of(uint32_t key) { return from_bits(key & 0x80000000u ? key & 0x7fffffffu : ~key); }
__device__ __forceinline__ double value_of(uint64_t key) {
  constexpr uint64_t sign = uint64_t(1) << 63;
  return from_bits(key & sign ? key & ~sign : ~key);
}

template <class T>
using KeyOf = decltype(key_of(widen(T())));

__device__ __forceinline__ uint32_t warp_max(uint32_t key) { return __reduce_max_sync(kEveryLane, key); }
__device__ __forceinline__ uint64_t warp_max(uint64_t key) {
  for (int mask = 16; mask; mask /= 2) key = max(key, __shfl_xor_sync(kEveryLane, key, mask));
  return key;
}

// The largest key of all threads. Once a kernel: no barrier protects the next call.
template <class Key>
__device__ __forceinline__ Key block_max(Key key) {
  __shared__ Key keys[32];
  const int lane = threadIdx.x % 32;
  key = warp_max(key);
  if (lane == 0) keys[threadIdx.x / 32] = key;
  __syncthreads();
  return warp_max(lane < int(blockDim.x / 32) ? keys[lane] : Key(0));
}

// Kept is every key above `least`, and the first `ties` of those equal to it.
template <class Key>
struct Cut {
  Key least;
  int ties;
};

// Of `count` keys the `total` best; key_at(i) is at least 1. One bit after the other, by counting.
template <class Key, class KeyAt>
__device__ Cut<Key> best(int count, int total, const KeyAt& key_at) {
  const int thread = threadIdx.x, threads = blockDim.x;
  const Key own = thread < count ? key_at(thread) : Key(0);
  const auto counted = [&](auto wanted) {
    int found = __syncthreads_count(own != 0 && wanted(own));
    for (int i = thread + threads; i - thread < count; i += threads) found += __syncthreads_count(i < count && wanted(key_at(i)));
    return found;
  };
  Key least = 0;
  for (int bit = sizeof(Key) * 8 - 1; bit >= 0; --bit) {
    const Key tried = least | Key(1) << bit;
    const int found = counted([tried](Key key) { return key >= tried; });
    if (found >= total) least = tried;
    if (found == total) break;
  }
  const int above = counted([least](Key key) { return key > least; });
  return {least, total - above};
}

// Two counts over the threads before this one, and over all. Each below 65,536 in sum.
struct Before {
  int first, second, all_first, all_second;
};
__device__ __forceinline__ Before count_before(bool first, bool second) {
  __shared__ unsigned sums[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned firsts = __ballot_sync(kEveryLane, first), seconds = __ballot_sync(kEveryLane, second), below = (1u << lane) - 1;
  if (lane == 0) sums[warp] = __popc(firsts) | __popc(seconds) << 16;
  __syncthreads();
  const unsigned own = lane < int(blockDim.x / 32) ? sums[lane] : 0;
  const unsigned before = __reduce_add_sync(kEveryLane, lane < warp ? own : 0u), all = __reduce_add_sync(kEveryLane, own);
  __syncthreads();
  return {int(before & 0xffff) + __popc(firsts & below), int(before >> 16) + __popc(seconds & below), int(all & 0xffff), int(all >> 16)};
}

// keep(n, i): of `count` keys the n-th kept is i, in ascending order.
template <class Key, class KeyAt, class Keep>
__device__ void for_each_kept(int count, const Cut<Key>& cut, const KeyAt& key_at, const Keep& keep) {
  int above = 0, ties = 0;
  for (int start = 0; start < count; start += blockDim.x) {
    const int i = start + threadIdx.x;
    const Key key = i < count ? key_at(i) : Key(0);
    const bool over = key > cut.least, tie = i < count && key == cut.least;
    const Before before = count_before(over, tie);
    const int tie_number = ties + before.second;
    if (over || (tie && tie_number < cut.ties)) keep(above + before.first + min(tie_number, cut.ties), i);
    above += before.all_first, ties += before.all_second;
  }
}

}  // namespace sparse_attention::eagle
