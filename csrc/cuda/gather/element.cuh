// Sixteen bytes of a row, as numbers of the accumulator's type.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace sparse_attention::gather {
namespace {

template <typename T>
struct Accumulator {
  using Type = float;
};
template <>
struct Accumulator<double> {
  using Type = double;
};

constexpr int kChunkBytes = 16;

// kAligned: `p` is a multiple of 16 bytes; else of one element. What is read through here, no thread writes.
template <typename T, bool kAligned>
__device__ inline uint4 fetch(const T* p) {
  if constexpr (kAligned) {
    return __ldg(reinterpret_cast<const uint4*>(p));
  } else if constexpr (sizeof(T) == 8) {
    const uint2 a = __ldg(reinterpret_cast<const uint2*>(p)), b = __ldg(reinterpret_cast<const uint2*>(p) + 1);
    return {a.x, a.y, b.x, b.y};
  } else if constexpr (sizeof(T) == 4) {
    const auto* words = reinterpret_cast<const uint32_t*>(p);
    return {__ldg(words), __ldg(words + 1), __ldg(words + 2), __ldg(words + 3)};
  } else {
    const auto* halves = reinterpret_cast<const uint16_t*>(p);
    const auto word = [&](int n) { return uint32_t(__ldg(halves + 2 * n)) | uint32_t(__ldg(halves + 2 * n + 1)) << 16; };
    return {word(0), word(1), word(2), word(3)};
  }
}

__device__ inline void widen(const uint4& chunk, float (&to)[8], __nv_bfloat16) {
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    to[2 * n] = __uint_as_float(words[n] << 16);
    to[2 * n + 1] = __uint_as_float(words[n] & 0xffff0000u);
  }
}
__device__ inline void widen(const uint4& chunk, float (&to)[8], __half) {
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const float2 two = __half22float2(reinterpret_cast<const __half2&>(words[n]));
    to[2 * n] = two.x, to[2 * n + 1] = two.y;
  }
}
__device__ inline void widen(const uint4& chunk, float (&to)[4], float) {
  to[0] = __uint_as_float(chunk.x), to[1] = __uint_as_float(chunk.y);
  to[2] = __uint_as_float(chunk.z), to[3] = __uint_as_float(chunk.w);
}
__device__ inline void widen(const uint4& chunk, double (&to)[2], double) {
  to[0] = __hiloint2double(chunk.y, chunk.x), to[1] = __hiloint2double(chunk.w, chunk.z);
}

__device__ inline __nv_bfloat16 narrow(float x, __nv_bfloat16) { return __float2bfloat16_rn(x); }
__device__ inline __half narrow(float x, __half) { return __float2half_rn(x); }
__device__ inline float narrow(float x, float) { return x; }
__device__ inline double narrow(double x, double) { return x; }

// to[0 .. kCount) = x * factor
template <bool kAligned, typename T, typename A, int kCount>
__device__ inline void put(T* to, const A (&x)[kCount], A factor) {
  alignas(kChunkBytes) T values[kCount];
#pragma unroll
  for (int n = 0; n < kCount; ++n) values[n] = narrow(x[n] * factor, T());
  if constexpr (kAligned) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(values);
  } else {
#pragma unroll
    for (int n = 0; n < kCount; ++n) to[n] = values[n];
  }
}

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <typename A>
__device__ inline A infinity() {
  return A(__int_as_float(0x7f800000));
}
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }  // of a number and a NaN, the number
__device__ inline double larger(double a, double b) { return fmax(a, b); }
__device__ inline float power_of_2(float x) { return exp2f(x); }
__device__ inline double power_of_2(double x) { return exp2(x); }
__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }
// Of x from 1 to 2^31: an approximation and Newton's steps, in place of a division, which is a call.
template <typename A>
__device__ inline A reciprocal(A x) {
  A guess = 1.0f / float(x);
#pragma unroll
  for (int n = 0; n < int(sizeof(A)) / 4; ++n) guess = fma(guess, fma(-x, guess, A(1)), guess);
  return guess;
}

}  // namespace
}  // namespace sparse_attention::gather
