// Scores as integers whose order is (score descending, index ascending); and the dispatch by element type.
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "eagle.h"
#include "simd.h"

namespace sparse_attention::eagle {

template <class A>
struct RankOf;
template <>
struct RankOf<float> {
  using Bits = uint32_t;
  using Rank = uint64_t;
};
template <>
struct RankOf<double> {
  using Bits = uint64_t;
  using Rank = unsigned __int128;
};

// Lower ranks come first. x is no NaN; -0.0 equals 0.0.
template <class A>
typename RankOf<A>::Rank rank(A x, int64_t index) {
  using Bits = typename RankOf<A>::Bits;
  constexpr int width = sizeof(Bits) * 8;
  constexpr Bits sign = Bits(1) << (width - 1);
  x = x == A(0) ? A(0) : x;
  Bits bits;
  std::memcpy(&bits, &x, sizeof bits);
  const Bits ascending = bits & sign ? ~bits : bits | sign;
  return typename RankOf<A>::Rank(Bits(~ascending)) << width | Bits(index);
}

template <class A>
int64_t index_of(typename RankOf<A>::Rank rank) {
  return int64_t(typename RankOf<A>::Bits(rank));
}

// run(T*) with a null pointer of the element type.
template <class Run>
auto by_type(Dtype dtype, Run run) {
  switch (dtype) {
    case Dtype::f32: return run(static_cast<float*>(nullptr));
    case Dtype::bf16: return run(static_cast<BFloat16*>(nullptr));
    case Dtype::f16: return run(static_cast<Float16*>(nullptr));
    default: return run(static_cast<double*>(nullptr));
  }
}

// Elements [start, start + count) widened, for a count of up to kBlock; in `buffer` unless they already are of the accumulator's type.
constexpr int64_t kBlock = 1024;
template <class T>
const Acc<T>* widened(const T* row, int64_t count, Acc<T>* buffer) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    return row;
  } else {
    const int64_t whole = count / 8 * 8;
    widen(row, buffer, int(whole));
    for (int64_t i = whole; i < count; ++i) buffer[i] = widen(row[i]);
    return buffer;
  }
}

// The largest of x[0..count), NaN left out; -infinity if there is none.
template <class A>
A largest(const A* x, int64_t count) {
  constexpr int lanes = Simd<A>::lanes;
  A best = -kInfinity<A>;
  int64_t i = 0;
  if (count >= 4 * lanes) {
    Vec<A> most[4];
    for (auto& m : most) m = splat<A>(-kInfinity<A>);
    for (; i + 4 * lanes <= count; i += 4 * lanes)
      for (int u = 0; u < 4; ++u) {
        const Vec<A> y = load(x + i + u * lanes);
        most[u] = y > most[u] ? y : most[u];
      }
    for (const auto& m : most)
      for (int l = 0; l < lanes; ++l) best = m[l] > best ? m[l] : best;
  }
  for (; i < count; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

}  // namespace sparse_attention::eagle
