// csrc/cuda/eagle/device.cuh for the host: blocks one after the other in random order, threads as fibers. Shared memory is filled with
// rubbish before each block.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <numeric>
#include <type_traits>

#include "threads.h"

#undef __shared__
#define __shared__ static

inline Index blockDim;

using std::size_t;

namespace host {

template <class T, class F>
T over_warp(T mine, F act) {
  struct {
    T value, got;
  } both{mine, mine};
  together(both, [&](auto** x) { act(x); });
  return both.got;
}

inline int count_of_block = 0, counted = 0;
alignas(16) inline unsigned char shared_memory[96 * 1024];
inline std::mt19937 random_order(7);
inline std::mutex one_launch;

}  // namespace host

inline unsigned __ballot_sync(unsigned, bool value) {
  return host::over_warp<unsigned>(value, [](auto** x) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= unsigned(x[lane]->value) << lane;
    for (int lane = 0; lane < 32; ++lane) x[lane]->got = bits;
  });
}
inline unsigned __match_any_sync(unsigned, int value) {
  return host::over_warp<int>(value, [](auto** x) {
    for (int lane = 0; lane < 32; ++lane) {
      unsigned bits = 0;
      for (int other = 0; other < 32; ++other) bits |= unsigned(x[other]->value == x[lane]->value) << other;
      x[lane]->got = int(bits);
    }
  });
}
template <class T, class F>
T reduced(T value, F join) {
  return host::over_warp<T>(value, [&](auto** x) {
    T all = x[0]->value;
    for (int lane = 1; lane < 32; ++lane) all = join(all, x[lane]->value);
    for (int lane = 0; lane < 32; ++lane) x[lane]->got = all;
  });
}
inline unsigned __reduce_add_sync(unsigned, unsigned value) { return reduced(value, [](unsigned a, unsigned b) { return a + b; }); }
inline unsigned __reduce_max_sync(unsigned, unsigned value) { return reduced(value, [](unsigned a, unsigned b) { return std::max(a, b); }); }
inline unsigned __reduce_min_sync(unsigned, unsigned value) { return reduced(value, [](unsigned a, unsigned b) { return std::min(a, b); }); }
template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return host::over_warp<T>(value, [from](auto** x) {
    for (int lane = 0; lane < 32; ++lane) x[lane]->got = x[from]->value;
  });
}

template <class T>
T __shfl_up_sync(unsigned, T value, int step) {
  return host::over_warp<T>(value, [step](auto** x) {
    for (int lane = 0; lane < 32; ++lane) x[lane]->got = x[lane < step ? lane : lane - step]->value;
  });
}

inline int __syncthreads_count(bool value) {
  host::counted += value;
  __syncthreads();
  const int found = host::counted;
  __syncthreads();
  if (threadIdx.x == 0) host::counted = 0;
  __syncthreads();
  return found;
}
inline bool __syncthreads_and(bool value) { return __syncthreads_count(!value) == 0; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
inline void __threadfence() {}
template <class T>
void atomicMax(T* at, T value) {
  *at = std::max(*at, value);
}
template <class T>
void atomicMin(T* at, T value) {
  *at = std::min(*at, value);
}
inline unsigned atomicInc(unsigned* at, unsigned last) {
  const unsigned old = *at;
  *at = old >= last ? 0 : old + 1;
  return old;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint64_t(a) * b >> 32; }

namespace sparse_attention::eagle {

struct BFloat16 {
  uint16_t bits;
};
using Float16 = _Float16;

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline uint64_t bits_of(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  return bits;
}
inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline double from_bits(uint64_t bits) {
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return from_bits(uint32_t(x.bits) << 16); }
inline float widen(Float16 x) { return float(x); }
inline void narrow(float x, float* to) { *to = x; }
inline void narrow(double x, double* to) { *to = x; }
inline void narrow(float x, BFloat16* to) {
  const uint32_t bits = bits_of(x);
  to->bits = uint16_t(x != x ? bits >> 16 | 64 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float x, Float16* to) { *to = Float16(x); }

template <class T>
float element_of(uint32_t word, int half) {
  if constexpr (sizeof(T) == 4) return from_bits(word);
  const uint16_t bits = uint16_t(half ? word >> 16 : word);
  T x;
  std::memcpy(&x, &bits, 2);
  return widen(x);
}
template <class T>
uint32_t word_max(uint32_t a, uint32_t b) {
  const auto larger = [](float x, float y) { return x != x || y > x ? y : x; };
  if constexpr (sizeof(T) == 4) return bits_of(larger(from_bits(a), from_bits(b)));
  uint32_t most = 0;
  for (int half = 0; half < 2; ++half) {
    T x;
    narrow(larger(element_of<T>(a, half), element_of<T>(b, half)), &x);
    uint16_t bits;
    std::memcpy(&bits, &x, 2);
    most |= uint32_t(bits) << 16 * half;
  }
  return most;
}

inline uint4 load_once(const uint4* from) { return *from; }
template <class T>
T load_shared_by_blocks(const T* from) {
  return *from;
}
template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(host::shared_memory);
}

constexpr size_t kMostShared = 96 * 1024;

inline bool is_capturing(void*) { return host::random_order() % 2; }
inline int clear(void* at, size_t bytes, void*) { return std::memset(at, 0, bytes), 0; }

template <class... P, class... A>
int launch(void (*kernel)(P...), int64_t blocks, int threads, size_t shared, void*, const A&... arguments) {
  if (shared > kMostShared || threads % 32 || threads > 1024) return 1;
  const std::lock_guard guard(host::one_launch);
  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), host::random_order);
  blockDim.x = threads, gridDim.x = uint32_t(blocks);
  for (uint32_t block : order) {
    std::memset(host::shared_memory, 0xa5, shared);
    blockIdx.x = block;
    host::run_block(threads, host::random_order, [&] { kernel(arguments...); });
  }
  return 0;
}

}  // namespace sparse_attention::eagle

using sparse_attention::eagle::BFloat16;
