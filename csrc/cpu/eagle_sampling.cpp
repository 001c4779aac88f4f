// Verification by coins. Arithmetic in double; a row of probabilities is read in full where a child was rejected and at the end.
#include <cmath>

#include "eagle_rank.h"
#include "eagle_walk.h"

namespace sparse_attention::eagle {
namespace {

constexpr double kTop = 1.0 - 0x1p-24;

double clamped(double coin) { return coin < 1.0 ? std::max(coin, 0.0) : kTop; }

// Numbers 0 .. count - 1 of request b: Philox4x32-10 (Salmon et al. 2011), key seed, counter (offset, b, number / 4).
void uniforms(int64_t seed, int64_t offset, int64_t b, int64_t count, double* out) {
  for (int64_t block = 0; block * 4 < count; ++block) {
    uint32_t c[4] = {uint32_t(offset), uint32_t(uint64_t(offset) >> 32), uint32_t(b), uint32_t(block)};
    uint32_t key[2] = {uint32_t(seed), uint32_t(uint64_t(seed) >> 32)};
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = uint64_t(0xD2511F53) * c[0], p1 = uint64_t(0xCD9E8D57) * c[2];
      const uint32_t next[4] = {uint32_t(p1 >> 32) ^ c[1] ^ key[0], uint32_t(p1), uint32_t(p0 >> 32) ^ c[3] ^ key[1], uint32_t(p0)};
      std::copy_n(next, 4, c);
      key[0] += 0x9E3779B9;
      key[1] += 0xBB67AE85;
    }
    for (int64_t i = 0; i < std::min<int64_t>(4, count - block * 4); ++i) out[block * 4 + i] = (c[i] >> 8) * 0x1p-24;
  }
}

bool usable(double p) { return p > 0 && std::isfinite(p); }

template <class T>
struct Row {
  const T* p;
  int64_t vocab;
  std::vector<int64_t>& rejected;  // tokens, some perhaps twice
  std::vector<double> sums;        // of each block, usable numbers only
  bool malformed = false;

  // Sums every block, the rejected tokens left out if `rest`.
  double sum(bool rest) {
    sums.assign((vocab + kBlock - 1) / kBlock, 0.0);
    Acc<T> buffer[kBlock];
    for (size_t block = 0; block < sums.size(); ++block) {
      const int64_t start = int64_t(block) * kBlock, count = std::min(kBlock, vocab - start);
      const Acc<T>* x = widened(p + start, count, buffer);
      double lanes[8] = {};
      bool bad = false;
      for (int64_t i = 0; i < count; ++i) {
        const double y = x[i];
        bad |= !(y >= 0 && y <= std::numeric_limits<Acc<T>>::max());
        lanes[i % 8] += usable(y) ? y : 0.0;
      }
      malformed |= bad;
      sums[block] = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
      if (rest && std::any_of(rejected.begin(), rejected.end(), [&](int64_t t) { return t >= start && t < start + count; })) {
        sums[block] = 0;
        for (int64_t i = 0; i < count; ++i) sums[block] += left(start + i);
      }
    }
    double total = 0;
    for (double s : sums) total += s;
    return total;
  }
  double at(int64_t token) const {
    const double y = token >= 0 && token < vocab ? double(widen(p[token])) : 0.0;
    return usable(y) ? y : 0.0;
  }
  double left(int64_t token) const { return std::find(rejected.begin(), rejected.end(), token) == rejected.end() ? at(token) : 0.0; }
  double rejected_sum() const {
    double total = 0;
    for (size_t i = 0; i < rejected.size(); ++i)
      if (std::find(rejected.begin(), rejected.begin() + i, rejected[i]) == rejected.begin() + i) total += at(rejected[i]);
    return total;
  }
  // The first token whose cumulative sum is more than coin * total, by the sums that `sum` left; 0 without any probability.
  int64_t draw(double coin, double total) const {
    const double goal = coin * total;
    double before = 0;
    int64_t last = 0;
    for (size_t block = 0; block < sums.size(); ++block) {
      if (sums[block] == 0) continue;
      const int64_t stop = std::min(vocab, int64_t(block + 1) * kBlock);
      if (before + sums[block] > goal) {
        double reached = before;
        for (int64_t t = int64_t(block) * kBlock; t < stop; ++t) {
          const double y = left(t);
          if (y == 0) continue;
          last = t;
          reached += y;
          if (reached > goal) return t;
        }
      }
      before += sums[block];
      last = stop - 1;
    }
    while (last > 0 && left(last) == 0) --last;  // rounding left the goal at the very end
    return last;
  }
};

template <class T>
bool walk_all(const WalkIn& in, const T* probs, int64_t vocab, const Coins& numbers, const WalkOut& out) {
  bool malformed = links_malformed(in);
#pragma omp parallel for reduction(|| : malformed) if (in.batch > 1)
  for (int64_t b = 0; b < in.batch; ++b) {
    std::vector<double> coins(in.nodes + 1);
    if (numbers.coins) {
      for (int64_t n = 0; n <= in.nodes; ++n) {
        const double coin = n < in.nodes ? numbers.coins[b * in.nodes + n] : numbers.final_coins[b];
        malformed = malformed || !(coin >= 0 && coin < 1);
        coins[n] = clamped(coin);
      }
    } else {
      uniforms(numbers.seed, numbers.offset, b, in.nodes + 1, coins.data());
    }
    for (int64_t n = 1; n < in.nodes; ++n) {
      const int64_t token = in.draft_tokens[b * in.nodes + n];
      malformed = malformed || token < 0 || token >= vocab;
    }
    std::vector<int64_t> rejected;
    Walk walk(in, out, b);
    int64_t used = 0;
    bool accepted = true;
    while (accepted && !walk.full()) {
      accepted = false;
      rejected.clear();
      Row<T> row{probs + (b * in.nodes + walk.node) * vocab, vocab, rejected, {}};
      double left = 1, tried = 0, whole = -1;
      for (int64_t child = walk.first(); child >= 0; child = walk.next()) {
        const int64_t token = walk.token(child);
        const double chance = row.at(token);
        if (numbers.target_only) {
          tried += chance;
          accepted = (chance > 0 && coins[walk.node] <= tried / std::max(numbers.threshold_acc, 1e-9)) ||
                     (token >= 0 && token < vocab && chance >= numbers.threshold_single);
        } else {
          if (std::find(rejected.begin(), rejected.end(), token) != rejected.end()) continue;
          accepted = chance > 0 && coins[used] <= chance / left;
          ++used;
        }
        if (accepted) break;
        rejected.push_back(token);
        if (numbers.target_only) continue;
        if (whole < 0) whole = row.sum(false);
        left = whole - row.rejected_sum();
        if (left <= 0) break;
      }
      malformed = malformed || row.malformed;
      if (accepted) walk.accept();
    }
    if (accepted) rejected.clear();
    const T* p = probs + (b * in.nodes + walk.node) * vocab;
    Row<T> row{p, vocab, rejected, {}};
    double total = row.sum(true);
    T* sample = out.sample_p ? static_cast<T*>(out.sample_p) + b * vocab : nullptr;
    const bool rest = !rejected.empty() && total > 0;
    if (!rest && !rejected.empty()) {
      rejected.clear();
      total = row.sum(false);
    }
    malformed = malformed || row.malformed || !(total > 0);
    walk.finish(out, row.draw(coins[in.nodes], total));
    if (!sample) continue;
    if (rest)
      for (int64_t t = 0; t < vocab; ++t) narrow(Acc<T>(row.at(t) / total), sample + t);
    else
      std::copy_n(p, vocab, sample);
    if (rest)
      for (int64_t t : rejected)
        if (t >= 0 && t < vocab) sample[t] = T{};
  }
  return malformed;
}

}  // namespace

bool verify_sampling(const WalkIn& in, Dtype dtype, const void* probs, int64_t vocab, const Coins& numbers, const WalkOut& out) {
  return by_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return walk_all(in, static_cast<const T*>(probs), vocab, numbers, out);
  });
}

}  // namespace sparse_attention::eagle
