// Arithmetic on scattered rows: n dot products with one vector, and a weighted sum of n rows.
//
// `Dim` is int or std::integral_constant: the compiler unrolls the common head_dims and keeps their sums in registers.
#pragma once
#include <algorithm>
#include <type_traits>

#include "../params.h"
#include "simd.h"

namespace sparse_attention::gather {

constexpr int kMaxDim = 256;
constexpr int kTogether = 4;  // rows in flight at once: hides the latency of a load and of a chain of FMAs

// Calls run(dim) with a compile-time dim where it is a common one.
template <class F>
inline void with_dim(int dim, F run) {
  if (dim == 64) return run(std::integral_constant<int, 64>());
  if (dim == 128) return run(std::integral_constant<int, 128>());
  run(dim);
}

// Vector loads from storage. head_dim is a multiple of 8, so only a vector of 16 lanes can reach past the row: half of it does.
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
inline Vec<Acc<T>> fetch_half(const T* p) {
  alignas(kVectorBytes) Acc<T> x[Simd<Acc<T>>::lanes] = {};
  widen(p, x, 8);
  return load(x);
}

// Buffers hold head_dim values rounded up to whole vectors; what lies past head_dim is 0.
template <class A>
constexpr int padded(int n) {
  constexpr int lanes = Simd<A>::lanes;
  return (n + lanes - 1) / lanes * lanes;
}

// Calls body(d, fetch of 1 vector) at each vector's first element: row(d) of a storage row, padded with zeros.
template <class T, class Dim, class Body>
inline void for_each_vector(Dim dim, Body body) {
  constexpr int L = Simd<Acc<T>>::lanes;
  const int whole = dim / L * L;
#pragma GCC unroll 16
  for (int d = 0; d < whole; d += L) body(d, [d](const T* row) { return fetch(row + d); });
  if constexpr (L > 8) {
    if (whole < dim) body(whole, [whole](const T* row) { return fetch_half(row + whole); });
  }
}

typedef float Quad __attribute__((vector_size(16)));
typedef int32_t QuadIndex __attribute__((vector_size(16)));

// Halves a vector by combine(low half, high half) until 16 bytes are left.
template <class A, int From = kVectorBytes, class V, class F>
inline auto fold(V x, F combine) {
  if constexpr (From == 16) {
    return x;
  } else {
    typedef A Half __attribute__((vector_size(From / 2)));
    Half half[2];
    std::memcpy(half, &x, From);
    return fold<A, From / 2>(combine(half[0], half[1]), combine);
  }
}

constexpr auto add = [](auto a, auto b) { return a + b; };
constexpr auto larger = [](auto a, auto b) { return a > b ? a : b; };

// combine() over all lanes.
template <class A, class F>
inline A reduce(Vec<A> x, F combine) {
  const auto last = fold<A>(x, combine);
  if constexpr (sizeof(A) == 8) {
    return combine(last[0], last[1]);
  } else {
    return combine(combine(last[0], last[1]), combine(last[2], last[3]));
  }
}

// out[n] = sum of the lanes of x[n], n < 4
inline void sum_lanes_of_four(const Vec<double>* x, double* out) {
  for (int n = 0; n < 4; ++n) out[n] = reduce<double>(x[n], add);
}
inline void sum_lanes_of_four(const Vec<float>* x, float* out) {
  Quad four[4];
  for (int n = 0; n < 4; ++n) four[n] = fold<float>(x[n], add);
  const auto add_pairs = [](Quad a, Quad b) {
    return __builtin_shuffle(a, b, QuadIndex{0, 2, 4, 6}) + __builtin_shuffle(a, b, QuadIndex{1, 3, 5, 7});
  };
  const Quad sums = add_pairs(add_pairs(four[0], four[1]), add_pairs(four[2], four[3]));
  std::memcpy(out, &sums, sizeof(sums));
}

// out[n] = x . rows[n]. Works on whole groups of kTogether: `rows` must be readable, and `out` writable, up to the next multiple.
template <class T, class Dim>
inline void dots(const Acc<T>* x, const T* const* rows, int n, Dim dim, Acc<T>* out) {
  static_assert(kTogether == 4);
  for (int r = 0; r < n; r += kTogether) {
    Vec<Acc<T>> sum[kTogether] = {};
    for_each_vector<T>(dim, [&](int d, auto row_at) {
      const Vec<Acc<T>> y = load(x + d);
      for (int m = 0; m < kTogether; ++m) sum[m] += y * row_at(rows[r + m]);
    });
    sum_lanes_of_four(sum, out + r);
  }
}

template <class A, class Dim>
inline void clear_row(Dim dim, A* row) {
  for (int d = 0; d < padded<A>(dim); d += Simd<A>::lanes) store(row + d, Vec<A>{});
}

// total = total * decay + sum_n weight[n] * rows[n]. The sum is taken on its own: one sum over all steps of a long row would lose up
// to sqrt(steps) times as much to rounding.
template <class T, class Dim>
inline void combine(const Acc<T>* weight, const T* const* rows, int n, Dim dim, Acc<T> decay, Acc<T>* total) {
  using A = Acc<T>;
  constexpr int L = Simd<A>::lanes;
  if constexpr (!std::is_same_v<Dim, int>) {
    constexpr int V = Dim::value / L;
    Vec<A> sum[V] = {};
    for (int r = 0; r < n; ++r) {
      const Vec<A> w = splat(weight[r]);
#pragma GCC unroll 32
      for (int v = 0; v < V; ++v) sum[v] += w * fetch(rows[r] + v * L);
    }
    for (int v = 0; v < V; ++v) store(total + v * L, load(total + v * L) * decay + sum[v]);
    return;
  }
  alignas(kVectorBytes) A part[kMaxDim];
  clear_row(dim, part);
  int r = 0;
  for (; r + kTogether <= n; r += kTogether)
    for_each_vector<T>(dim, [&](int d, auto row_at) {
      Vec<A> sum = load(part + d);
      for (int m = 0; m < kTogether; ++m) sum += weight[r + m] * row_at(rows[r + m]);
      store(part + d, sum);
    });
  for (; r < n; ++r)
    for_each_vector<T>(dim, [&](int d, auto row_at) { store(part + d, load(part + d) + weight[r] * row_at(rows[r])); });
  for (int d = 0; d < padded<A>(dim); d += L) store(total + d, load(total + d) * decay + load(part + d));
}

// to = from * factor, padded with zeros.
template <class T, class Dim>
inline void read_row(const T* from, Dim dim, Acc<T> factor, Acc<T>* to) {
  for_each_vector<T>(dim, [&](int d, auto row_at) { store(to + d, row_at(from) * factor); });
}

// row *= factor
template <class A, class Dim>
inline void scale_row(A factor, Dim dim, A* row) {
  for (int d = 0; d < padded<A>(dim); d += Simd<A>::lanes) store(row + d, load(row + d) * factor);
}

template <class T, class Dim>
inline void prefetch_row(const T* row, Dim dim) {
  for (int d = 0; d < dim; d += 64 / int(sizeof(T))) __builtin_prefetch(row + d);
}

template <class T>
inline T* row_of(const Tensor4& x, int batch, int head, int64_t row) {
  return static_cast<T*>(x.data) + batch * x.batch + head * x.head + row * x.row;
}

}  // namespace sparse_attention::gather
