// Vectors of the accumulator's type, their exponential, and the conversions from and to the storage types.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

namespace sparse_attention {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int lanes = kVectorBytes / 4;
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  static constexpr float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int32_t exponent_shift = 23;
  static constexpr float min_exponent = -126.0f;
  // Relative minimax of 2^f on [-1/2, 1/2], error 1.9e-9 before rounding.
  static constexpr float poly[] = {1.0000000005541647f,    0.6931472057371958f,   0.24022646890645522f,
                                   0.05550328777105325f,   0.009618488956331182f, 0.0013399931177239738f,
                                   0.00015345812161311629f};
};

template <>
struct Simd<double> {
  static constexpr int lanes = kVectorBytes / 8;
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int64_t exponent_shift = 52;
  static constexpr double min_exponent = -1022.0;
  // Relative minimax of 2^f on [-1/2, 1/2], error 3.1e-18 before rounding.
  static constexpr double poly[] = {1.0,
                                    0.6931471805599453,
                                    0.24022650695910155,
                                    0.055504108664819925,
                                    0.009618129107588335,
                                    0.0013333558146789923,
                                    0.00015403530462514432,
                                    1.5252733489988525e-05,
                                    1.32154330896764e-06,
                                    1.0178198021671931e-07,
                                    7.074105613508143e-09,
                                    4.435282706957277e-10};
};

template <class A>
using Vec = typename Simd<A>::Vec;

template <class A>
inline Vec<A> load(const A* p) {
  return *reinterpret_cast<const typename Simd<A>::Unaligned*>(p);
}

template <class A>
inline void store(A* p, Vec<A> x) {
  *reinterpret_cast<typename Simd<A>::Unaligned*>(p) = x;
}

template <class A>
inline Vec<A> splat(A x) {
  return x - Vec<A>{};
}

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

// 2^x for x <= 0; exactly 0 below the smallest normal exponent and for -inf, NaN for NaN.
template <class A>
inline Vec<A> exp2_nonpositive(Vec<A> x) {
  using S = Simd<A>;
  using V = Vec<A>;
  using I = typename S::Int;
  const I underflow = x < splat<A>(S::min_exponent);
  const V shifted = x + S::round_magic;
  const V n = shifted - S::round_magic;
  const V f = x - n;
  constexpr int degree = sizeof(S::poly) / sizeof(A) - 1;
  V y = splat<A>(S::poly[degree]);
#pragma GCC unroll 16
  for (int k = degree - 1; k >= 0; --k) y = y * f + S::poly[k];
  const I exponent = reinterpret_cast<I>(shifted) << S::exponent_shift;
  return underflow ? V{} : reinterpret_cast<V>(reinterpret_cast<I>(y) + exponent);
}

// Lane l of the answer is x where bit l of `word` is set, else `other`.
template <class A>
inline Vec<A> select_bits(uint32_t word, Vec<A> x, Vec<A> other) {
  using I = typename Simd<A>::Int;
  I bit;
  for (int l = 0; l < Simd<A>::lanes; ++l) bit[l] = decltype(bit[0] + 0)(1) << l;
  const I words = I{} + decltype(bit[0] + 0)(word);
  return (words & bit) != 0 ? x : other;
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using Acc = typename Accumulator<T>::type;

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float widen(Float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  _Float16 h;
  std::memcpy(&h, &x.bits, 2);
  return float(h);
#endif
}

// `n` is a multiple of 8, as head_dim is.
template <class A>
inline void widen(const A* from, A* to, int n) {
  std::memcpy(to, from, n * sizeof(A));
}
inline void widen(const BFloat16* from, float* to, int n) {
  for (int d = 0; d < n; ++d) to[d] = widen(from[d]);
}
inline void widen(const Float16* from, float* to, int n) {
#if defined(__F16C__)
  for (int d = 0; d < n; d += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + d));
    _mm256_storeu_ps(to + d, _mm256_cvtph_ps(half));
  }
#else
  for (int d = 0; d < n; ++d) to[d] = widen(from[d]);
#endif
}

// An 8 x 8 block: row r of the answer is column r of what was there.
template <class A>
inline void transpose8(A (&block)[8][8]) {
#if defined(__AVX2__)
  if constexpr (sizeof(A) == 4) {
    __m256 r[8], t[8];
    for (int x = 0; x < 8; ++x) r[x] = _mm256_loadu_ps(block[x]);
    for (int x = 0; x < 8; x += 2) {
      t[x] = _mm256_unpacklo_ps(r[x], r[x + 1]);
      t[x + 1] = _mm256_unpackhi_ps(r[x], r[x + 1]);
    }
    for (int x = 0; x < 8; x += 4)
      for (int y = 0; y < 2; ++y) {
        r[x + 2 * y] = _mm256_shuffle_ps(t[x + y], t[x + y + 2], 0x44);
        r[x + 2 * y + 1] = _mm256_shuffle_ps(t[x + y], t[x + y + 2], 0xee);
      }
    for (int x = 0; x < 4; ++x) {
      _mm256_storeu_ps(block[x], _mm256_permute2f128_ps(r[x], r[x + 4], 0x20));
      _mm256_storeu_ps(block[x + 4], _mm256_permute2f128_ps(r[x], r[x + 4], 0x31));
    }
    return;
  }
#endif
  for (int x = 0; x < 8; ++x)
    for (int y = 0; y < x; ++y) std::swap(block[x][y], block[y][x]);
}

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(double x, double* to) { *to = x; }
// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
inline void narrow(float x, BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  to->bits = x != x ? uint16_t((bits >> 16) | 0x40) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(float x, Float16* to) {
#if defined(__F16C__)
  to->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const _Float16 h = _Float16(x);
  std::memcpy(&to->bits, &h, 2);
#endif
}

template <class A>
inline void narrow(const A* from, A* to, int n) {
  std::memcpy(to, from, n * sizeof(A));
}
inline void narrow(const float* from, BFloat16* to, int n) {
  for (int d = 0; d < n; ++d) narrow(from[d], to + d);
}
inline void narrow(const float* from, Float16* to, int n) {
#if defined(__F16C__)
  for (int d = 0; d < n; d += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + d),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + d), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int d = 0; d < n; ++d) narrow(from[d], to + d);
#endif
}

}  // namespace sparse_attention
