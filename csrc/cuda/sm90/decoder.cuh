// What warpgroups do with the tiles of a cache, and where it goes: to the caller's tensors, to `join`, or to the blocks of the cluster.
#pragma once
#include "decode_copy.cuh"

namespace sparse_attention::sm90 {

template <class S, typename T>
struct Decoder : Attend<S, T, true, Decoder<S, T>> {
  using Base = Attend<S, T, true, Decoder>;
  using Base::group, Base::lane, Base::most, Base::out, Base::scale_log2, Base::shared, Base::sum, Base::thread, Base::warp;
  using Base::kChunk, Base::kChunks, Base::kScores, Base::kWide;
  using Base::convert, Base::each, Base::my_turn, Base::rescale, Base::soften, Base::your_turn;
  static constexpr bool kTurns = S::kQueries > 64;  // two warpgroups take turns at the tensor cores

  const Place<S>& place;
  const CacheMaps& maps;
  const Decode& d;
  const int length;
  const bool has_words;
  const uint32_t queries_at, tiles_at;  // in shared memory: this warpgroup's, and all keys, with all values behind them
  int word[2];  // of the ancestors of this thread's rows in shared memory: where that of key 0 would be

  __device__ Decoder(const Place<S>& place, const CacheMaps& maps, Shared<S>& shared, int length)
      : Base(shared, place.d.scale * 1.4426950408889634f), place(place), maps(maps), d(place.d), length(length),
        has_words(place.has_words(length - d.q_len)),
        queries_at(uniform(shared_address(shared.q) + group * 64 * 128)), tiles_at(uniform(shared_address(shared.tiles))) {
#pragma unroll
    for (int r = 0; r < 2; ++r) word[r] = (query(r) - place.first_query) * (d.words + 1) - prefix() / 64;
  }

  __device__ __forceinline__ int local(int r) const { return group * 64 + warp * 16 + lane / 4 + 8 * r; }

  __device__ __forceinline__ int prefix() const { return length - d.q_len; }

  // Of one of this thread's two rows; past the end the last.
  __device__ __forceinline__ int query(int r) const { return min(query_of_row(d, place.first_row + local(r)), d.q_len - 1); }

  // Of 64 keys, those that one of this thread's rows sees. first: the number of the first one, in 64 keys
  __device__ __forceinline__ uint64_t seen(int r, int first) const {
    if (has_words) {
      const int behind = first - prefix() / 64;  // the words of the prefix
      return behind < 0 ? ~uint64_t{0} : behind <= d.words ? shared.words[word[r] + first] : 0;
    }
    if (place.plain() && !d.ancestors) return low_bits(prefix() + query(r) + 1 - 64 * first);
    return seen_anyhow<S::kKeys>(d, place.batch, length, query(r), 64 * first);
  }

  // What is seen of a tile, where registers are left for it before the scores are there.
  static constexpr int kWords = S::kKeys / 64;
  static constexpr bool kEarly = kWords == 1;
  using Bits = uint64_t[2];

  __device__ __forceinline__ void look(Bits& bits, int mark) const {
    if constexpr (kEarly)
      if ((mark & kFull) != kFull)
#pragma unroll
        for (int r = 0; r < 2; ++r) bits[r] = seen(r, mark & kFull);
  }

  __device__ __forceinline__ void hide(float (&s)[kScores], const Bits& bits, int mark) {
    if ((mark & kFull) == kFull) return;
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int w = 0; w < kWords; ++w) this->hide_word(s, r, w, kEarly ? bits[r] : seen(r, (mark & kFull) * kWords + w));
  }

  // Values that nobody sees become 0: their weight is 0, but they may be NaN.
  __device__ __forceinline__ void bury(int mask, int stage) {
    constexpr int kPieces = S::kDim / 8, kStep = 128 / kPieces;  // of 16 bytes, a row; rows at a time
    const int begin = (mask & kFull) * S::kKeys, piece = thread % kPieces;
    const bool some = !place.plain() || shared.holes;  // not only those past the end
#pragma unroll 1
    for (int local = (some ? 0 : max(0, length - begin)) + thread / kPieces; local < S::kKeys; local += kStep) {
      const int key = begin + local;
      if (!some || key >= length || (shared.holes && !is_alive<S>(d, shared, key - prefix())) ||
          (!place.plain() && !kept_anyhow<S::kKeys>(d, place.batch, length, key)))
        *reinterpret_cast<uint4*>(shared.tiles[1][stage] + piece / 8 * S::kKeyBlock + local * 128 + piece % 8 * 16) = uint4{0, 0, 0, 0};
    }
    fence_async();
    named_sync<128>(4 + group);
  }

  __device__ __forceinline__ int wait_keys(const Ring<S::kStages>& ring) {
    barrier_wait(&shared.full[0][ring.stage], ring.phase);
    return shared.mask[ring.stage];
  }

  __device__ __forceinline__ void wait_values(const Ring<S::kStages>& ring, int mark) {
    barrier_wait(&shared.full[1][ring.stage], ring.phase);
    if (mark & kDead) bury(mark, ring.stage);
  }

  __device__ __forceinline__ void free(uint64_t* barriers, Ring<S::kStages>& ring) {
    if (S::kMates == 1 && lane == 0) barrier_arrive(&barriers[ring.stage]);
    if (S::kMates > 1 && lane < S::kMates) barrier_arrive_at(&barriers[ring.stage], lane);
    ring.next();
  }

  // Base's score and weigh in a third of the instructions: addresses are known to be a warp's, and additions apart.
  __device__ __forceinline__ void score(float (&s)[kScores], int stage) {
    const uint64_t q = descriptor(queries_at, 16), k = descriptor(tiles_at + stage * sizeof(shared.tiles[0][0]), 16);
    pin(s);
    products_fence();
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b)
#pragma unroll
      for (int x = 0; x < 4; ++x)
        product_shared<T>(s, behind(q, b * S::kQueryBlock + 32 * x), behind(k, b * S::kKeyBlock + 32 * x), b + x > 0);
    products_commit();
  }

  __device__ __forceinline__ void weigh(const uint32_t (&weights)[S::kKeys / 16][4], int stage, bool add) {
    const uint64_t v = descriptor(tiles_at + sizeof(shared.tiles[0]) + stage * sizeof(shared.tiles[0][0]), S::kKeyBlock);
    pin_out();
    products_fence();
#pragma unroll
    for (int x = 0; x < S::kKeys / 16; ++x)
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
        product_registers<T>(out[c], weights[x], behind(v, c * (kWide / 64) * S::kKeyBlock + 2048 * x), add || x > 0);
    products_commit();
  }

  __device__ __forceinline__ void pin_out() {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) pin(out[c]);
  }

  // Scores of a tile are under way while those before become weights, and these are weighed while the scores do. The first tile takes the
  // same code as the others, since code that other kernels took the place of comes from far away: what is weighed beside its scores may be
  // anything, and the first weights begin anew.
  __device__ __forceinline__ void run() {
    Ring<S::kStages> keys, values;
    float s[kScores], worth[2];
    uint32_t weights[S::kKeys / 16][4];
    Bits bits;
    int mark = 0, weighed = -1;  // tiles
#pragma unroll
    for (int r = 0; r < 2; ++r) most[r] = -INFINITY, sum[r] = 0;
    if (kTurns && group == 1) your_turn();
    if (maps.boxed) barrier_wait(&shared.q_full, 0);
    if constexpr (S::kFirstApart) {  // the other warpgroup would wait for products of nothing
      mark = wait_keys(keys);
      my_turn();
      score(s, keys.stage);
      look(bits, mark);
      products_wait<0>();
      pin(s);
      your_turn();
      free(shared.empty[0], keys);
      hide(s, bits, mark);
      soften(s, worth);
      convert(weights, s);
      weighed = 0;
    }
    while (!(mark & kLast)) {
      const int earlier = mark;
      mark = wait_keys(keys);
      if (weighed >= 0) wait_values(values, earlier);
      if (kTurns) my_turn();
      score(s, keys.stage);
      weigh(weights, values.stage, weighed > 0);
      if (kTurns) your_turn();
      look(bits, mark);
      products_wait<1>();
      pin(s);
      free(shared.empty[0], keys);
      hide(s, bits, mark);
      soften(s, worth);
      pin(s);  // before the wait
      products_wait<0>();
      pin_out();
      if (weighed >= 0) free(shared.empty[1], values);
      ++weighed;
      convert(weights, s);
      rescale(worth);
    }
    wait_values(values, mark);
    weigh(weights, values.stage, weighed > 0);
    products_wait<0>();
    pin_out();
    decoding::allow_next();
    if (kTurns && group == 0) my_turn();  // leaves no arrival behind
  }

  // A row without a query, and one that saw nothing, is 0.
  __device__ __forceinline__ void close_rows(float (&keep)[2], float (&lse)[2]) {
    this->close(keep, lse);
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (prefix() + query(r) < 0 || !is_alive<S>(d, shared, query(r))) keep[r] = 0, lse[r] = -INFINITY;
  }

  // What of rows that are 0 may be NaN.
  __device__ __forceinline__ void clear_rows(const float (&keep)[2]) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < kChunk; ++i) out[c][i] = keep[i / 2 % 2] == 0 ? 0 : out[c][i];
  }

  // To the caller's tensors, through the memory of the queries.
  __device__ __forceinline__ void write() {
    constexpr int kPieces = S::kDim / 8;  // of 16 bytes, a row
    float keep[2], lse[2];
    close_rows(keep, lse);
    named_sync<128>(4 + group);  // all have their last scores
    uint8_t* const mine = shared.q + (group * 64 + warp * 16) * 128;
    const auto kept = [&](float x, float y, int r) { return pack<T>(keep[r] == 0 ? 0 : x * keep[r], keep[r] == 0 ? 0 : y * keep[r]); };
#pragma unroll
    for (int j = 0; j < kPieces / 2; ++j) {
      const float* x = &out[j / (kWide / 16)][j % (kWide / 16) * 8];
      const uint32_t address = shared_address(mine) + j / 4 * S::kQueryBlock + lane % 16 * 128 + ((2 * j + lane / 16) % 8 ^ lane % 8) * 16;
      store_matrices(address, kept(x[0], x[1], 0), kept(x[2], x[3], 1), kept(x[4], x[5], 0), kept(x[6], x[7], 1));
    }
    const int first = place.first_row + group * 64 + warp * 16, left = place.rows - first;
    if (maps.boxed) {
      fence_async();
      __syncwarp();
      if (lane == 0 && left > 0) {
#pragma unroll
        for (int b = 0; b < S::kBlocks; ++b)
          tensor_store(&maps.out, mine + b * S::kQueryBlock, 64 * b, 0, query_of_row(d, first), place.kv_head, place.batch);
        store_commit();
        store_wait_read();
      }
    } else {
      __syncwarp();
      for (int n = lane; n < min(16, left) * kPieces; n += 32) {
        const int at = n / kPieces, piece = n % kPieces;
        if (8 * piece < d.head_dim)
          *reinterpret_cast<uint4*>(decoding::row_of<T>(d, d.out, place.batch, place.kv_head, first + at) + 8 * piece) =
              *reinterpret_cast<const uint4*>(mine + piece / 8 * S::kQueryBlock + at * 128 + (piece % 8 ^ at % 8) * 16);
      }
    }
    if (lane % 4 || !d.lse) return;
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (const int row = place.first_row + local(r); row < place.rows) d.lse[decoding::lse_of(d, place.batch, place.kv_head, row)] = lse[r];
  }

  // Of part_out and part_lse. part: which of those that `join` adds up
  __device__ __forceinline__ int64_t part_row(int part, int row) const {
    return ((int64_t{part} * d.batch + place.batch) * d.kv_heads + place.kv_head) * place.rows + row;
  }

  // To where `join` finds it. Neighbouring threads exchange pairs of columns, so that each has four in a row.
  __device__ __forceinline__ void write_part() {
    float keep[2], lse[2];
    close_rows(keep, lse);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool real = place.first_row + local(r) < place.rows, odd = lane % 2;
      const int64_t at = part_row(place.split, place.first_row + local(r));
      if (real && lane % 4 == 0) d.part_lse[at] = lse[r];
      const auto kept = [&](float x) { return keep[r] == 0 ? 0 : x * keep[r]; };
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int i = 0; i < kChunk; i += 8) {
          const float low[2] = {kept(out[c][i + 2 * r]), kept(out[c][i + 2 * r + 1])}, high[2] = {kept(out[c][i + 4 + 2 * r]), kept(out[c][i + 5 + 2 * r])};
          const float got[2] = {__shfl_xor_sync(~0u, odd ? low[0] : high[0], 1), __shfl_xor_sync(~0u, odd ? low[1] : high[1], 1)};
          const int column = c * kWide + 2 * i + (odd ? 8 : 0) + lane % 4 / 2 * 4;
          if (real && column < d.head_dim)
            *reinterpret_cast<float4*>(d.part_out + at * d.head_dim + column) =
                odd ? float4{got[0], got[1], high[0], high[1]} : float4{low[0], low[1], got[0], got[1]};
        }
    }
  }

  // To where the blocks of the cluster find it. Nobody uses the memory of tiles and queries any more.
  __device__ __forceinline__ void show() {
    float keep[2], lse[2];
    close_rows(keep, lse);
    if (__any_sync(~0u, keep[0] == 0 || keep[1] == 0)) clear_rows(keep);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (lane % 4 == 0) shared.ends()[local(r)] = {keep[r] == 0 ? -INFINITY : most[r] * scale_log2, keep[r] == 0 ? 0 : sum[r]};
      float* const to = shared.floats() + local(r) * Shared<S>::kPitch;
      each(r, [&](int column, float x, float y) { *reinterpret_cast<float2*>(to + column) = float2{x, y}; });
    }
  }

  // The splits of a cluster, each block for some columns of some rows.
  __device__ __forceinline__ void merge() {
    constexpr int kQuads = S::kDim / 4, kThreads = 2 * S::kQueries;
    const int step = d.cluster * kThreads, end = min(S::kQueries, place.rows - place.first_row) * kQuads;
    const int rank = d.cluster == d.splits ? place.split : place.split % d.cluster;
    for (int n = rank * kThreads + 128 * group + thread; n < end; n += step) {
      const int local = n / kQuads, column = n % kQuads * 4;
      decoding::Merged all;
      all.template add<8>(d.cluster, [&](int block) { return *decoding::of_block(&shared.ends()[local], block); },
              [&](int block) { return *decoding::of_block(reinterpret_cast<const float4*>(shared.floats() + local * Shared<S>::kPitch + column), block); });
      store(all, place.first_row + local, column);
    }
  }

  __device__ __forceinline__ void store(const decoding::Merged& all, int row, int column) {
    if (d.cluster == d.splits) {
      if (column == 0 && d.lse) d.lse[decoding::lse_of(d, place.batch, place.kv_head, row)] = all.lse();
      if (column < d.head_dim) all.store(decoding::row_of<T>(d, d.out, place.batch, place.kv_head, row) + column);
    } else {
      const int64_t at = part_row(place.split / d.cluster, row);
      if (column == 0) d.part_lse[at] = all.lse();
      if (column < d.head_dim) all.store(d.part_out + at * d.head_dim + column);
    }
  }
};

}  // namespace sparse_attention::sm90
