// Greedy verification. Only the visited nodes' logits are read.
#include "eagle_rank.h"
#include "eagle_walk.h"

namespace sparse_attention::eagle {
namespace {

// The lowest token of the largest logit; NaN is never the largest, and a row without a number gives 0.
template <class T>
int64_t best_token(const T* row, int64_t vocab) {
  using A = Acc<T>;
  A buffer[kBlock];
  A best = -kInfinity<A>;
  int64_t token = 0;
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t count = std::min(kBlock, vocab - start);
    const A* x = widened(row + start, count, buffer);
    const A most = largest(x, count);
    if (!(most > best)) continue;
    best = most;
    token = start + (std::find(x, x + count, most) - x);
  }
  return token;
}

template <class T>
bool walk_all(const WalkIn& in, const T* logits, const int64_t* targets, int64_t vocab, const WalkOut& out) {
#pragma omp parallel for if (in.batch > 1 && vocab > 0)
  for (int64_t b = 0; b < in.batch; ++b) {
    Walk walk(in, out, b);
    const auto target = [&] {
      const int64_t at = b * in.nodes + walk.node;
      return targets ? targets[at] : best_token(logits + at * vocab, vocab);
    };
    int64_t wanted = target();
    while (!walk.full()) {
      int64_t child = walk.first();
      while (child >= 0 && walk.token(child) != wanted) child = walk.next();
      if (child < 0) break;
      walk.accept();
      wanted = target();
    }
    walk.finish(out, wanted);
    if (out.sample_p) std::copy_n(logits + (b * in.nodes + walk.node) * vocab, vocab, static_cast<T*>(out.sample_p) + b * vocab);
  }
  return links_malformed(in);
}

}  // namespace

bool verify_greedy(const WalkIn& in, Dtype dtype, const void* logits, const int64_t* targets, int64_t vocab, const WalkOut& out) {
  return by_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return walk_all(in, static_cast<const T*>(logits), targets, vocab, out);
  });
}

}  // namespace sparse_attention::eagle
