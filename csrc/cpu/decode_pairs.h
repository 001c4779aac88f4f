// The products of the lanes way with AVX512_BF16: an element is two bfloat16 numbers, and one instruction adds two products to a float32
// sum (VDPBF16PS). Keys are read where they lie; values are interleaved by twos, and weights rounded to bfloat16, as SDPA rounds them.
#pragma once
#include "decode_lanes.h"

// Assembly, for the instructions are used where the processor has them and not by a whole file; clang's assembler wants the latter.
#if defined(__AVX512F__) && !defined(__clang__)
#define SPARSE_ATTENTION_PAIRS
#endif

#ifdef SPARSE_ATTENTION_PAIRS
namespace sparse_attention::decoding {

struct PairOp {
  using Sum = float;
  using Row = BFloat16;
  using Element = uint32_t;
  static constexpr int numbers = 2;
  static Vec<float> spread(const Row* x) {
    uint32_t pair;
    std::memcpy(&pair, x, 4);
    return reinterpret_cast<Vec<float>>(_mm512_set1_epi32(pair));
  }
  static Vec<float> lanes(const Element* x) { return load(reinterpret_cast<const float*>(x)); }
  static Vec<float> add_product(Vec<float> sum, Vec<float> x, Vec<float> lane) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(lane), "v"(x));
    return sum;
  }
};

// Lane l of the answer holds `low` and `high` of lane l, rounded to nearest even.
inline Vec<float> pair_of(Vec<float> low, Vec<float> high) {
  __m512i both;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(high), "v"(low));
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return reinterpret_cast<Vec<float>>(_mm512_permutexvar_epi16(_mm512_load_si512(order), both));
}

struct PairProducts {
  using A = float;
  explicit PairProducts(const DecodeParams& p) : dim(p.head_dim) {}

  // Whether this processor has the instructions, and the scale leaves q as it is.
  static bool apply(const DecodeParams& p) {
    return __builtin_cpu_supports("avx512bf16") && ScoreScale<A>(p.scale).factor == 1;
  }

  void pack(const DecodeParams& p, const Tile& tile, A, A* packed) const {
    const BFloat16* queries[kLanes];
    for (int l = 0; l < tile.count; ++l) queries[l] = tile.row<const BFloat16>(p, p.q, l);
    const int pairs = dim / 2;  // a multiple of 4
    for (int l0 = 0; l0 < ceil_div(tile.count, kPanel<A>) * kPanel<A>; l0 += 8)
      for (int d0 = 0; d0 < pairs; d0 += 8) {
        const bool whole = d0 + 8 <= pairs;
        float block[8][8] = {};
        for (int l = 0; l < 8 && l0 + l < tile.count; ++l)
          whole ? std::memcpy(block[l], queries[l0 + l] + 2 * d0, 32) : std::memcpy(block[l], queries[l0 + l] + 2 * d0, 16);
        transpose8(block);
        A* to = packed + (l0 / kPanel<A> * pairs + d0) * kPanel<A> + l0 % kPanel<A>;
        for (int d = 0; d < (whole ? 8 : 4); ++d) std::memcpy(to + d * kPanel<A>, block[d], sizeof(block[d]));
      }
  }

  void begin(const Cache<BFloat16>& keys, const Cache<BFloat16>& values, const Block& block, LanesScratch<A>& s) {
    if (!block.packed && keys.regular(block.at(0), block.n)) {
      k = {keys.row(block.at(0)), keys.stride};
    } else {
      BFloat16* copy = reinterpret_cast<BFloat16*>(s.k);
      for (int r = 0; r < block.n; ++r) std::memcpy(copy + r * dim, keys.row(block.at(r)), 2 * dim);
      k = {copy, dim};
    }
    uint32_t* pairs = reinterpret_cast<uint32_t*>(s.v);
    for (int r = 0; r < block.n; r += 2) {
      const BFloat16* low = values.row(block.at(r));
      uint32_t* to = pairs + r / 2 * dim;
      if (r + 1 == block.n) {
        for (int d = 0; d < dim; ++d) to[d] = low[d].bits;
        break;
      }
      const BFloat16* high = values.row(block.at(r + 1));
      for (int d = 0; d < dim; ++d) to[d] = low[d].bits | uint32_t(high[d].bits) << 16;
    }
    v = reinterpret_cast<const BFloat16*>(pairs);
  }
  template <int V>
  void dot(const A* packed, int panel, int low, int high, A* score, Ahead& ahead) const {
    const uint32_t* lanes = reinterpret_cast<const uint32_t*>(packed) + panel * (dim / 2) * kPanel<A>;
    decoding::dot<PairOp, V>(k.data + low * k.stride, k.stride, high - low, lanes, dim / 2, score + low * kPanel<A>, ahead);
  }
  // Weights of keys r and r + 1 become the pairs of row r / 2.
  template <int V>
  void round(A* score, int low, int high) const {
    for (int r = low; r < high; r += 2)
      for (int x = 0; x < V * Simd<A>::lanes; x += Simd<A>::lanes) {
        const Vec<A> next = r + 1 < high ? load(score + (r + 1) * kPanel<A> + x) : Vec<A>{};
        store(score + r / 2 * kPanel<A> + x, pair_of(load(score + r * kPanel<A> + x), next));
      }
  }
  template <int V>
  void accumulate(const A* weight, int low, int high, const A* decay, A* total, Ahead& ahead) const {
    decoding::accumulate<PairOp, V>(v, 2 * dim, low / 2, (high + 1) / 2, reinterpret_cast<const uint32_t*>(weight), dim, decay, total,
                                    ahead);
  }

  int dim;
  Rows<BFloat16> k;
  const BFloat16* v;  // rows of dim pairs
};

}  // namespace sparse_attention::decoding
#endif
