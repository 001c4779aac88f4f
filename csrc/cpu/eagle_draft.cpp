// A draft step: log-softmax and the best tokens in two passes over a row, and the best of all continuations.
#include <cmath>

#include "eagle_rank.h"

namespace sparse_attention::eagle {
namespace {

// The k largest of what is offered in ascending index; the first offered wins among equals.
template <class A>
struct Best {
  explicit Best(int64_t k) : k(k) {
    values.reserve(k + 1);
    indices.reserve(k + 1);
  }
  bool wants(A x) const { return int64_t(values.size()) < k || x > values.back(); }
  void offer(A x, int64_t index) {
    if (!wants(x)) return;
    const auto at = std::upper_bound(values.begin(), values.end(), x, [](A a, A b) { return a > b; }) - values.begin();
    values.insert(values.begin() + at, x);
    indices.insert(indices.begin() + at, index);
    if (int64_t(values.size()) > k) {
      values.pop_back();
      indices.pop_back();
    }
  }
  int64_t k;
  std::vector<A> values;
  std::vector<int64_t> indices;
};

constexpr int64_t kInsertion = 64;  // above it a heap of ranks beats inserting

constexpr int64_t kChunk = 64;        // of a block that holds a better token, these are looked at one by one

// Whether there is a NaN or an infinity.
template <class A>
bool any_bad(const A* x, int64_t count) {
  constexpr int lanes = Simd<A>::lanes;
  typename Simd<A>::Int bad{};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) bad |= ~(load(x + i) < splat<A>(kInfinity<A>));
  bool found = false;
  for (int l = 0; l < lanes; ++l) found |= bad[l] != 0;
  for (; i < count; ++i) found |= !(x[i] < kInfinity<A>);
  return found;
}

// Widened, with minus infinity for NaN and infinity, unless `known_good`.
template <class T>
const Acc<T>* clean(const T* row, int64_t count, Acc<T>* buffer, bool known_good, bool* malformed) {
  using A = Acc<T>;
  const A* x = widened(row, count, buffer);
  if (known_good || !any_bad(x, count)) return x;
  *malformed = true;
  for (int64_t i = 0; i < count; ++i) buffer[i] = x[i] < kInfinity<A> ? x[i] : -kInfinity<A>;
  return buffer;
}

template <class A>
double sum_of_exponentials(const A* x, int64_t count, A most) {
  constexpr int lanes = Simd<A>::lanes;
  const A log2e = A(1.4426950408889634);
  Vec<A> sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * lanes <= count; i += 4 * lanes)
    for (int u = 0; u < 4; ++u) sums[u] += exp2_nonpositive<A>((load(x + i + u * lanes) - most) * log2e);
  const Vec<A> sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double total = 0;
  for (int l = 0; l < lanes; ++l) total += sum[l];
  for (; i < count; ++i) total += std::exp(double(x[i]) - double(most));
  return total;
}

template <class T>
bool best_tokens(const T* row, int64_t vocab, int64_t k, const int64_t* d2t, T* values, int64_t* tokens) {
  using A = Acc<T>;
  A buffer[kBlock];
  bool malformed = false;
  Best<A> best(std::min(k, kInsertion));
  std::vector<typename RankOf<A>::Rank> ranks(k > kInsertion ? vocab : 0);
  A most = -kInfinity<A>;
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t count = std::min(kBlock, vocab - start);
    const A* x = clean(row + start, count, buffer, false, &malformed);
    const A top = largest(x, count);
    most = std::max(most, top);
    if (k > kInsertion) {
      for (int64_t i = 0; i < count; ++i) ranks[start + i] = rank(x[i], start + i);
    } else if (best.wants(top)) {
      for (int64_t chunk = 0; chunk < count; chunk += kChunk) {
        const int64_t stop = std::min(count, chunk + kChunk);
        if (!best.wants(largest(x + chunk, stop - chunk))) continue;
        for (int64_t i = chunk; i < stop; ++i)
          if (best.wants(x[i])) best.offer(x[i], start + i);
      }
    }
  }
  double total = 0;
  if (most > -kInfinity<A>)
    for (int64_t start = 0; start < vocab; start += kBlock) {
      const int64_t count = std::min(kBlock, vocab - start);
      const bool good = !malformed;
      total += sum_of_exponentials(clean(row + start, count, buffer, good, &malformed), count, most);
    }
  const double shift = double(most) + std::log(total);
  if (k > kInsertion) std::partial_sort(ranks.begin(), ranks.begin() + k, ranks.end());
  for (int64_t n = 0; n < k; ++n) {
    const int64_t token = k > kInsertion ? index_of<A>(ranks[n]) : best.indices[n];
    const A x = widen(row[token]);
    narrow(x < kInfinity<A> && most > -kInfinity<A> ? A(double(x) - shift) : -kInfinity<A>, values + n);
    tokens[n] = d2t ? token + d2t[token] : token;
  }
  return malformed;
}

template <class T>
bool frontier(const T* log_probs, const T* scores, const int64_t* tokens, int64_t rows, int64_t width, int64_t k, int64_t first_parent,
              int64_t b, const FrontierOut& out) {
  using A = Acc<T>;
  const int64_t candidates = rows * width;
  T* cumulative = static_cast<T*>(out.cumulative) + b * candidates;
  std::vector<typename RankOf<A>::Rank> ranks(candidates);
  bool malformed = false;
  for (int64_t r = 0; r < rows; ++r) {
    const A above = widen(scores[b * rows + r]);
    for (int64_t c = 0; c < width; ++c) {
      const int64_t i = r * width + c;
      A x = widen(log_probs[b * candidates + i]) + above;
      if (x != x) {
        malformed = true;
        x = -kInfinity<A>;
      }
      narrow(x, cumulative + i);
      ranks[i] = rank(widen(cumulative[i]), i);
    }
  }
  std::partial_sort(ranks.begin(), ranks.begin() + k, ranks.end());
  for (int64_t n = 0; n < k; ++n) {
    const int64_t i = index_of<A>(ranks[n]), at = b * k + n;
    static_cast<T*>(out.scores)[at] = cumulative[i];
    out.index[at] = i;
    out.rows[at] = i / width;
    if (out.tokens) out.tokens[at] = tokens[b * candidates + i];
    if (out.parents) out.parents[at] = i + first_parent;
  }
  return malformed;
}

}  // namespace

bool logsoftmax_topk(Dtype dtype, const void* logits, int64_t rows, int64_t vocab, int64_t k, const int64_t* d2t, void* values,
                     int64_t* tokens) {
  return by_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    bool malformed = false;
#pragma omp parallel for reduction(|| : malformed) if (rows > 1 && rows * vocab > 65536)
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = static_cast<const T*>(logits) + r * vocab;
      malformed = best_tokens(row, vocab, k, d2t, static_cast<T*>(values) + r * k, tokens + r * k) || malformed;
    }
    return malformed;
  });
}

bool cumulative_topk(Dtype dtype, const void* log_probs, const void* scores, const int64_t* tokens, int64_t batch, int64_t rows,
                     int64_t width, int64_t k, int64_t first_parent, const FrontierOut& out) {
  return by_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    bool malformed = false;
    for (int64_t b = 0; b < batch; ++b)
      malformed |= frontier(static_cast<const T*>(log_probs), static_cast<const T*>(scores), tokens, rows, width, k, first_parent, b, out);
    return malformed;
  });
}

}  // namespace sparse_attention::eagle
