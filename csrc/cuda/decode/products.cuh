// A warp's products with a tile: 16 queries with its keys, weights with its values. Accumulator i of columns 8 j to 8 j + 7 is row
// 8 (i / 2) + lane / 4, column lane % 4 * 2 + i % 2.
#pragma once
#include "shape.cuh"

namespace sparse_attention::decoding {

// bfloat16 and float16.
template <class S, bool kSingle = S::kSingle>
struct Products {
  static constexpr int kSteps = S::kDim / 16;
  using Queries = uint32_t[S::kHold ? kSteps : 1][4];

  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x / 32 % S::kRowWarps * 16, key = threadIdx.x / 32 / S::kRowWarps * S::kMine;  // this warp's first ones

  __device__ __forceinline__ void load(uint32_t (&a)[4], const uint8_t* queries, int x) const {
    const uint32_t q = shared_address(queries) + place<S>(row + lane % 16, lane / 16);
    sm80::load_matrices(a, (q ^ (x % 4 * 32)) + x / 4 * 128);
  }

  // Step x of the queries, from registers where they are held.
  __device__ __forceinline__ void take(uint32_t (&a)[4], const Queries& held, const uint8_t* queries, int x) const {
    if constexpr (S::kHold) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = held[x][i];
    } else {
      load(a, queries, x);
    }
  }

  __device__ __forceinline__ void score(float (&s)[S::kMine / 8][4], const Queries& held, const uint8_t* queries, const uint8_t* stage) const {
    const uint32_t k = shared_address(stage) + place<S>(key + lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int x = 0; x < kSteps; ++x) {
      uint32_t a[4];
      take(a, held, queries, x);
#pragma unroll
      for (int j = 0; j < S::kMine / 16; ++j) {
        uint32_t b[4];
        sm80::load_matrices(b, (k ^ (x % 4 * 32)) + x / 4 * 128 + j * 16 * S::kPitch);
        sm80::multiply<typename S::T>(s[2 * j], a, b[0], b[1]);
        sm80::multiply<typename S::T>(s[2 * j + 1], a, b[2], b[3]);
      }
    }
  }

  __device__ __forceinline__ void weigh(float (&out)[S::kDim / 8][4], const float (&s)[S::kMine / 8][4], const uint8_t* stage) const {
    const uint32_t v = shared_address(stage + S::kStage / 2) + place<S>(key + lane % 16, lane / 16);
#pragma unroll
    for (int x = 0; x < S::kMine / 16; ++x) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = sm80::pack<typename S::T>(s[2 * x + i / 2][i % 2 * 2], s[2 * x + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int j = 0; j < S::kDim / 16; ++j) {
        uint32_t b[4];
        sm80::load_matrices_transposed(b, (v ^ (j % 4 * 32)) + j / 4 * 128 + x * 16 * S::kPitch);
        sm80::multiply<typename S::T>(out[2 * j], a, b[0], b[1]);
        sm80::multiply<typename S::T>(out[2 * j + 1], a, b[2], b[3]);
      }
    }
  }
};

// A float32 as two of TF32. Of the four products of two such pairs that of the small parts is left out: about float32's own error.
struct Halves {
  uint32_t big[4], small[4];
  __device__ __forceinline__ void set(int i, float x) {
    big[i] = to_tf32(x);
    small[i] = to_tf32(x - as_float(big[i]));
  }
};

struct Pair {
  uint32_t big[2], small[2];
  __device__ __forceinline__ Pair(float x, float y) : big{to_tf32(x), to_tf32(y)}, small{to_tf32(x - as_float(big[0])), to_tf32(y - as_float(big[1]))} {}
};

// What tensor cores add to is cut off and not rounded, which adds up: so the products with small parts have a sum of their own, and what
// is added to for all keys is added to outside of them.
__device__ __forceinline__ void multiply_single(float (&c)[4], float (&little)[4], const Halves& a, const Pair& b) {
  multiply_tf32(little, a.small, b.big[0], b.big[1]);
  multiply_tf32(little, a.big, b.small[0], b.small[1]);
  multiply_tf32(c, a.big, b.big[0], b.big[1]);
}

// float32: steps of 8. Column c of a step's weights is key 2 c, column c + 4 the one after: no lane needs another's.
template <class S>
struct Products<S, true> {
  static constexpr int kSteps = S::kDim / 8;
  using Queries = uint32_t[S::kHold ? kSteps : 1][4];

  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x / 32 % S::kRowWarps * 16, key = threadIdx.x / 32 / S::kRowWarps * S::kMine;

  __device__ __forceinline__ static float at(const uint8_t* tile, int row, int column) {
    return *reinterpret_cast<const float*>(tile + row * S::kPitch + column * 4);
  }

  __device__ __forceinline__ void load(uint32_t (&a)[4], const uint8_t* queries, int x) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float value = at(queries, row + lane / 4 + i % 2 * 8, 8 * x + lane % 4 + i / 2 * 4);
      memcpy(&a[i], &value, 4);
    }
  }

  // Step x of the queries, from registers where they are held.
  __device__ __forceinline__ void take(uint32_t (&a)[4], const Queries& held, const uint8_t* queries, int x) const {
    if constexpr (S::kHold) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = held[x][i];
    } else {
      load(a, queries, x);
    }
  }

  __device__ __forceinline__ void score(float (&s)[S::kMine / 8][4], const Queries& held, const uint8_t* queries, const uint8_t* stage) const {
    float little[S::kMine / 8][4] = {};
#pragma unroll
    for (int x = 0; x < kSteps; ++x) {
      uint32_t raw[4];
      take(raw, held, queries, x);
      Halves a;
#pragma unroll
      for (int i = 0; i < 4; ++i) a.set(i, as_float(raw[i]));
#pragma unroll
      for (int j = 0; j < S::kMine / 8; ++j) {
        const int row = key + 8 * j + lane / 4, column = 8 * x + lane % 4;
        multiply_single(s[j], little[j], a, Pair(at(stage, row, column), at(stage, row, column + 4)));
      }
    }
#pragma unroll
    for (int j = 0; j < S::kMine / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] += little[j][i];
  }

  __device__ __forceinline__ void weigh(float (&out)[S::kDim / 8][4], const float (&s)[S::kMine / 8][4], const uint8_t* stage) const {
    const uint8_t* values = stage + S::kStage / 2 + (key + lane % 4 * 2) * S::kPitch + lane / 4 * 4;
    constexpr int kTogether = S::kMine / 8 < 2 ? 1 : 2;
#pragma unroll 1
    for (int first = 0; first < S::kMine / 8; first += kTogether) {
      Halves a[kTogether];
#pragma unroll
      for (int x = 0; x < kTogether; ++x)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float weight = s[x][i % 2 * 2 + i / 2];
#pragma unroll
          for (int y = kTogether; y < S::kMine / 8; y += kTogether) weight = first == y ? s[y + x][i % 2 * 2 + i / 2] : weight;
          a[x].set(i, weight);
        }
#pragma unroll
      for (int j = 0; j < S::kDim / 8; ++j) {
        float part[4] = {};
#pragma unroll
        for (int x = 0; x < kTogether; ++x) {
          multiply_single(part, part, a[x], Pair(at(values, 8 * x, 8 * j), at(values, 8 * x + 1, 8 * j)));
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) out[j][i] += part[i];
      }
      values += 8 * kTogether * S::kPitch;
    }
  }
};

}  // namespace sparse_attention::decoding
