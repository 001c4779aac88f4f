// What csrc/cuda/gather uses of CUDA, for the host.
#pragma once
#include <utility>

#include "threads.h"

using std::fma;

struct dim3 {
  uint32_t x, y, z;
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

template <class K, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, K kernel, const A&... arguments) {
  static std::mt19937 random;
  for (blockIdx.x = 0; blockIdx.x < config->gridDim.x; ++blockIdx.x)
    host::run_block(config->blockDim.x, random, [&] { kernel(arguments...); });
  return cudaSuccess;
}

template <class To, class From>
To same_bits(const From& x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(To));
  return y;
}
inline float __uint_as_float(uint32_t x) { return same_bits<float>(x); }
inline float __int_as_float(int32_t x) { return same_bits<float>(x); }
inline double __hiloint2double(uint32_t high, uint32_t low) { return same_bits<double>(uint64_t(high) << 32 | low); }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

template <class T>
T __ldg(const T* p) {
  T x;
  std::memcpy(&x, p, sizeof(T));
  return x;
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  struct {
    T value, got;
    int lane;
  } mine{value, value, lane};
  host::together(mine, [](auto** x) {
    for (int l = 0; l < 32; ++l) x[l]->got = x[x[l]->lane]->value;
  });
  return mine.got;
}
