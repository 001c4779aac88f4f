// Which candidates a tree keeps: the best by (score descending, index ascending).
#include "eagle_rank.h"

namespace sparse_attention::eagle {
namespace {

template <class T>
bool select_rows(const T* scores, int64_t batch, int64_t candidates, int64_t total, int64_t* selected) {
  using A = Acc<T>;
  bool malformed = false;
  std::vector<typename RankOf<A>::Rank> ranks(candidates);
  std::vector<uint64_t> kept((candidates + 63) / 64);
  for (int64_t b = 0; b < batch; ++b, scores += candidates, selected += total) {
    for (int64_t f = 0; f < candidates; ++f) {
      A x = widen(scores[f]);
      if (x != x) {
        malformed = true;
        x = -kInfinity<A>;
      }
      ranks[f] = rank(x, f);
    }
    std::nth_element(ranks.begin(), ranks.begin() + (total - 1), ranks.end());
    std::fill(kept.begin(), kept.end(), 0);
    for (int64_t n = 0; n < total; ++n) {
      const int64_t f = index_of<A>(ranks[n]);
      kept[f / 64] |= uint64_t(1) << f % 64;
    }
    int64_t n = 0;
    for (size_t word = 0; word < kept.size(); ++word)
      for (uint64_t bits = kept[word]; bits; bits &= bits - 1) selected[n++] = int64_t(word) * 64 + __builtin_ctzll(bits);
  }
  return malformed;
}

}  // namespace

bool select(Dtype dtype, const void* scores, int64_t batch, int64_t candidates, int64_t total, int64_t* selected) {
  return by_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return select_rows(static_cast<const T*>(scores), batch, candidates, total, selected);
  });
}

}  // namespace sparse_attention::eagle
