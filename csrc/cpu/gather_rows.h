// Arithmetic on scattered rows: n dot products with one vector, and a weighted sum of n rows.
#pragma once
#include <algorithm>
#include <cmath>

#include "../params.h"
#include "simd.h"

namespace sparse_attention::gather {

constexpr int kMaxDim = 256;
constexpr int kTogether = 4;   // rows in flight at once: hides the latency of a load and of an FMA chain

// Vector loads from storage. `head_dim` is a multiple of 8, so only a 16-lane vector can reach past the row: `tail` is then 8.
template <class A>
inline Vec<A> fetch(const A* p) {
  return load(p);
}
inline Vec<float> fetch(const BFloat16* p) {
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
  typedef uint32_t Word __attribute__((vector_size(kVectorBytes)));
  const Word bits = __builtin_convertvector(*reinterpret_cast<const Half*>(p), Word) << 16;
  return reinterpret_cast<Vec<float>>(bits);
}
inline Vec<float> fetch(const Float16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> x;
  for (int l = 0; l < Simd<float>::lanes; ++l) x[l] = widen(p[l]);
  return x;
#endif
}
template <class T>
inline Vec<Acc<T>> fetch_tail(const T* p) {
  alignas(kVectorBytes) Acc<T> x[Simd<Acc<T>>::lanes] = {};
  widen(p, x, 8);
  return load(x);
}

// Buffers hold head_dim values rounded up to whole vectors; what lies past head_dim is 0.
template <class A>
constexpr int padded(int dim) {
  constexpr int lanes = Simd<A>::lanes;
  return (dim + lanes - 1) / lanes * lanes;
}

template <int Bytes, class A, class V>
inline A fold(V x) {
  if constexpr (Bytes == sizeof(A)) {
    return x[0];
  } else if constexpr (Bytes == 2 * sizeof(A)) {
    return x[0] + x[1];
  } else {
    typedef A Half __attribute__((vector_size(Bytes / 2)));
    Half half[2];
    std::memcpy(half, &x, Bytes);
    return fold<Bytes / 2, A>(half[0] + half[1]);
  }
}

template <class A>
inline A sum_lanes(Vec<A> x) {
  return fold<kVectorBytes, A>(x);
}

template <int N, class T>
inline void dots_of(const Acc<T>* x, const T* const* rows, int dim, Acc<T>* out) {
  using A = Acc<T>;
  constexpr int L = Simd<A>::lanes;
  Vec<A> sum[N] = {};
  int d = 0;
  for (; d + L <= dim; d += L) {
    const Vec<A> y = load(x + d);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[n] += y * fetch(rows[n] + d);
  }
  if constexpr (L > 8) {
    if (d < dim)
      for (int n = 0; n < N; ++n) sum[n] += load(x + d) * fetch_tail(rows[n] + d);
  }
  for (int n = 0; n < N; ++n) out[n] = sum_lanes<A>(sum[n]);
}

// out[n] = x . rows[n]
template <class T>
inline void dots(const Acc<T>* x, const T* const* rows, int n, int dim, Acc<T>* out) {
  int r = 0;
  for (; r + kTogether <= n; r += kTogether) dots_of<kTogether>(x, rows + r, dim, out + r);
  for (; r < n; ++r) dots_of<1>(x, rows + r, dim, out + r);
}

template <int N, class T>
inline void combine_of(const Acc<T>* weight, const T* const* rows, int dim, Acc<T>* total) {
  using A = Acc<T>;
  constexpr int L = Simd<A>::lanes;
  Vec<A> w[N];
  for (int n = 0; n < N; ++n) w[n] = splat(weight[n]);
  int d = 0;
  for (; d + L <= dim; d += L) {
    Vec<A> sum = load(total + d);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum += w[n] * fetch(rows[n] + d);
    store(total + d, sum);
  }
  if constexpr (L > 8) {
    if (d < dim) {
      Vec<A> sum = load(total + d);
      for (int n = 0; n < N; ++n) sum += w[n] * fetch_tail(rows[n] + d);
      store(total + d, sum);
    }
  }
}

// total += sum_n weight[n] * rows[n]
template <class T>
inline void combine(const Acc<T>* weight, const T* const* rows, int n, int dim, Acc<T>* total) {
  int r = 0;
  for (; r + kTogether <= n; r += kTogether) combine_of<kTogether>(weight + r, rows + r, dim, total);
  for (; r < n; ++r) combine_of<1>(weight + r, rows + r, dim, total);
}

// row *= factor
template <class A>
inline void scale_row(A factor, int dim, A* row) {
  for (int d = 0; d < padded<A>(dim); d += Simd<A>::lanes) store(row + d, load(row + d) * factor);
}

// to = from * factor, padded with zeros.
template <class T>
inline void read_row(const T* from, int dim, Acc<T> factor, Acc<T>* to) {
  using A = Acc<T>;
  widen(from, to, dim);
  std::fill(to + dim, to + padded<A>(dim), A(0));
  scale_row(factor, dim, to);
}

template <class T>
inline const T* row_of(const Tensor4& x, int batch, int head, int64_t row) {
  return static_cast<const T*>(x.data) + batch * x.batch + head * x.head + row * x.row;
}
template <class T>
inline T* mutable_row_of(const Tensor4& x, int batch, int head, int64_t row) {
  return static_cast<T*>(x.data) + batch * x.batch + head * x.head + row * x.row;
}

}  // namespace sparse_attention::gather
