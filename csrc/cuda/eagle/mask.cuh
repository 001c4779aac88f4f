// Rows of a tree's mask, from parents in shared memory: a bit for every ancestor, then the form asked for.
#pragma once
#include "device.cuh"
#include "eagle.h"

namespace sparse_attention::eagle {

constexpr int kMaskRows = 64;  // at a time

__host__ __device__ constexpr int words_of(int nodes) { return 2 * ((nodes + 63) / 64); }

template <class T>
__device__ __forceinline__ void mask_row(T* row, const uint32_t* bits, int nodes, T nothing, T one) {
  for (int n = threadIdx.x % 32; n < nodes; n += 32) row[n] = bits[n / 32] >> n % 32 & 1 ? one : nothing;
}

__device__ __forceinline__ int64_t prefix_of(const MaskOut& mask, int b) {
  const int64_t length = mask.prefix.there ? mask.prefix.there[b] : mask.prefix.here[b];
  return length < 0 ? 0 : min(length, mask.size);  // of a longer one nothing fits that differs
}

// A row of the full form, of which `room` elements fit.
__device__ __forceinline__ void full_row(uint8_t* row, const uint32_t* bits, int nodes, int64_t prefix, int64_t room) {
  const int64_t stop = min(prefix + nodes, room);
  for (int64_t i = threadIdx.x % 32; i < stop; i += 32) {
    const int n = int(i - prefix);
    row[i] = i < prefix ? 1 : bits[n / 32] >> n % 32 & 1;
  }
}

// Rows [begin, end) of request b by all threads. parent: each a lower node, or -1. bits: kMaskRows * words_of(nodes) words.
__device__ inline void write_mask(const int* parent, uint32_t* bits, const MaskOut& mask, int b, int nodes, int begin, int end) {
  if (mask.form == Form::none) return;
  const int thread = threadIdx.x, threads = blockDim.x, words = words_of(nodes);
  int64_t full_start = 0, full_prefix = 0;
  if (mask.form == Form::full) {
    full_prefix = prefix_of(mask, b);
    for (int before = 0; before < b && full_start < mask.size; ++before) full_start += nodes * (prefix_of(mask, before) + nodes);
  }
  for (int first = begin; first < end; first += kMaskRows) {
    const int count = min(kMaskRows, end - first);
    for (int i = thread; i < count * words; i += threads) bits[i] = 0;
    __syncthreads();
    for (int r = thread; r < count; r += threads)
      for (int n = first + r; n >= 0; n = parent[n]) bits[r * words + n / 32] |= 1u << n % 32;
    __syncthreads();
    for (int r = thread / 32; r < count; r += threads / 32) {
      const uint32_t* own = bits + r * words;
      const int64_t row = int64_t{b} * nodes + first + r, at = row * nodes;
      switch (mask.form) {
        case Form::boolean: mask_row<uint8_t>(static_cast<uint8_t*>(mask.data) + at, own, nodes, 0, 1); break;
        case Form::one_zero: mask_row(static_cast<float*>(mask.data) + at, own, nodes, 0.0f, 1.0f); break;
        case Form::additive:
          switch (mask.dtype) {
            case Dtype::f32: mask_row(static_cast<float*>(mask.data) + at, own, nodes, -3.402823466e+38f, 0.0f); break;
            case Dtype::f64: mask_row(static_cast<double*>(mask.data) + at, own, nodes, -1.7976931348623157e308, 0.0); break;
            case Dtype::bf16: mask_row<uint16_t>(static_cast<uint16_t*>(mask.data) + at, own, nodes, 0xff7f, 0); break;
            case Dtype::f16: mask_row<uint16_t>(static_cast<uint16_t*>(mask.data) + at, own, nodes, 0xfbff, 0); break;
          }
          break;
        case Form::bits: {
          uint64_t* to = static_cast<uint64_t*>(mask.data) + row * (words / 2);
          for (int w = thread % 32; w < words / 2; w += 32) to[w] = own[2 * w] | uint64_t(own[2 * w + 1]) << 32;
          break;
        }
        case Form::bits32: {
          const int used = (nodes + 31) / 32;
          for (int w = thread % 32; w < used; w += 32) static_cast<uint32_t*>(mask.data)[row * used + w] = own[w];
          break;
        }
        case Form::full: {
          const int64_t start = full_start + (first + r) * (full_prefix + nodes);
          if (start < mask.size) full_row(static_cast<uint8_t*>(mask.data) + start, own, nodes, full_prefix, mask.size - start);
          break;
        }
        case Form::none: break;
      }
    }
    __syncthreads();
  }
}

}  // namespace sparse_attention::eagle
