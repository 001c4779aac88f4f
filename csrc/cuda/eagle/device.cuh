// What the tree operations take from CUDA beyond the language: element types, dynamic shared memory, launches.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace sparse_attention::eagle {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(BFloat16 x) { return __uint_as_float(uint32_t(__bfloat16_as_ushort(x)) << 16); }
__device__ __forceinline__ float widen(Float16 x) { return __half2float(x); }

__device__ __forceinline__ void narrow(float x, float* to) { *to = x; }
__device__ __forceinline__ void narrow(double x, double* to) { *to = x; }
__device__ __forceinline__ void narrow(float x, BFloat16* to) { *to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, Float16* to) { *to = __float2half_rn(x); }

__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ uint64_t bits_of(double x) { return __double_as_longlong(x); }
__device__ __forceinline__ float from_bits(uint32_t x) { return __uint_as_float(x); }
__device__ __forceinline__ double from_bits(uint64_t x) { return __longlong_as_double(x); }

// The larger of two numbers, or of each of two pairs, in a 32-bit word; the one that is no NaN. Subnormal numbers count.
template <class T>
__device__ __forceinline__ uint32_t word_max(uint32_t a, uint32_t b) {
  uint32_t most;
  if constexpr (sizeof(T) == 4)
    asm("{ .reg .f32 x, y; mov.b32 x, %1; mov.b32 y, %2; max.f32 x, x, y; mov.b32 %0, x; }" : "=r"(most) : "r"(a), "r"(b));
  else if constexpr (std::is_same_v<T, BFloat16>)
    asm("max.bf16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  else
    asm("max.f16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  return most;
}

// Element `half` of a word.
template <class T>
__device__ __forceinline__ float element_of(uint32_t word, int half) {
  if constexpr (sizeof(T) == 4)
    return __uint_as_float(word);
  else if constexpr (std::is_same_v<T, BFloat16>)
    return __uint_as_float(half ? word & 0xffff0000u : word << 16);
  else
    return __half2float(__ushort_as_half(uint16_t(half ? word >> 16 : word)));
}

// Read once: past the first cache.
__device__ __forceinline__ uint4 load_once(const uint4* from) { return __ldcs(from); }
// What other blocks of this launch wrote.
template <class T>
__device__ __forceinline__ T load_shared_by_blocks(const T* from) {
  return __ldcg(from);
}

template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<T*>(memory);
}

constexpr size_t kPlainShared = 48 * 1024;
constexpr size_t kMostShared = 96 * 1024;  // what every device of compute capability 8.0 and later has

inline bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) == cudaSuccess && status != cudaStreamCaptureStatusNone;
}
inline int clear(void* at, size_t bytes, void* stream) { return cudaMemsetAsync(at, 0, bytes, static_cast<cudaStream_t>(stream)); }

// Returns a cudaError_t.
template <class... P, class... A>
int launch(void (*kernel)(P...), int64_t blocks, int threads, size_t shared, void* stream, const A&... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (shared > kPlainShared) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error != cudaSuccess) return error;
  }
  kernel<<<dim3(unsigned(blocks)), threads, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace sparse_attention::eagle
