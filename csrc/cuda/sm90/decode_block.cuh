// What a block of the decoding kernel knows: where its rows are, what is in its shared memory, and what its queries see of the new keys.
#pragma once
#include "../decode/join.cuh"
#include "../decode/span.cuh"
#include "consumer.cuh"

namespace sparse_attention::sm90 {

// Named barriers, beside 2 to 5, which are the warpgroups'.
constexpr int kHelpersMeet = 1, kBarriersReady = 6, kDecodersMeet = 7;

// kRows: 128 for two warpgroups, 64 for one. kWords: room for ancestor words. kMates: blocks of neighbouring rows that are a cluster, each of
// which brings some columns of every tile to all.
template <int kRows, int kDim, int kKeys, int kStages, int kWords_, int kMates_ = 1>
struct CacheShape : Shape<kDim, kKeys, kStages> {
  static constexpr int kWords = kWords_, kMates = kMates_, kQueries = kRows, kQueryBlock = kRows * 128, kThreads = 128 + 2 * kRows;
  static_assert(CacheShape::kBlocks % kMates == 0);
  static constexpr bool kMerges = kRows == 64 && kMates == 1;  // its splits may be a cluster
  static constexpr bool kFirstApart = kRows == 128 && (kMates > 1 || kWords > 320);  // where it was measured quicker, at head_dim 128
  static constexpr int kHelpers = kThreads - 32;  // all but the warp that copies keys
  static constexpr int kResident = kRows == 64 ? 2 : 1, kFewer = kRows == 64 ? 56 : 72, kMore = kRows == 64 ? 200 : 216;  // blocks at once; registers
};

// Where a block stands in the grid: (splits * mates, row tiles / mates * kv_heads, batch). Of all heads those tiles first that see most keys.
template <class S>
struct Place {
  const Decode& d;
  const int batch, kv_head, mate, split, first_row, rows;  // rows: of the group of heads
  const int first_query, queries;

  __device__ explicit Place(const Decode& d) : Place(d, uint64_t{blockIdx.y} * d.kv_inverse >> 32) {}
  __device__ Place(const Decode& d, int turn)
      : d(d), batch(blockIdx.z), kv_head(blockIdx.y - turn * d.kv_heads), mate(blockIdx.x % S::kMates), split(blockIdx.x / S::kMates),
        first_row(((d.group * d.q_len - 1) / S::kQueries - turn * S::kMates - mate) * S::kQueries), rows(d.group * d.q_len),
        first_query(query_of_row(d, first_row)), queries(query_of_row(d, min(rows, first_row + S::kQueries) - 1) + 1 - first_query) {}

  // Whether tiles are known without the length.
  __device__ __forceinline__ bool plain() const { return d.window < 0 && !d.block_table; }
  // The first row of the last tile among the block's and its mates'.
  __device__ __forceinline__ int last_tile() const { return first_row + mate * S::kQueries; }
  // Whether what the queries see of the new keys is in shared memory.
  __device__ __forceinline__ bool has_words(int prefix) const {
    return d.ancestors && plain() && prefix >= 0 && queries * (d.words + 1) <= S::kWords;
  }
};

// Whether the ancestor words of any block's queries find room.
template <class S>
bool has_room(const Decode& d) {
  return !d.ancestors || ((S::kQueries - 1) / d.group + 2) * (d.words + 1) <= S::kWords;
}

// The output leaves through the queries' memory, or, as floats for others of a cluster, through that of tiles.
template <int kRows, int kDim_, int kKeys_, int kStages_, int kWords, int kMates>
struct alignas(1024) Shared<CacheShape<kRows, kDim_, kKeys_, kStages_, kWords, kMates>> {
  using S = CacheShape<kRows, kDim_, kKeys_, kStages_, kWords, kMates>;
  static constexpr int kPitch = S::kDim + 8;  // floats of a row
  alignas(1024) uint8_t q[S::kBlocks * S::kQueryBlock];
  alignas(1024) uint8_t tiles[2][S::kStages][S::kBlocks * S::kKeyBlock];  // keys, values
  uint64_t full[2][S::kStages], empty[2][S::kStages], q_full, words_full;  // of keys, of values
  uint64_t words[kWords];                         // [queries, d.words + 1]; bit 0 of the first is a key whose number is a multiple of 64
  uint32_t used[S::kHelpers / 32], alive[32];     // words that some query of each warp's sees; nodes that there are
  int32_t missing[S::kHelpers / 32];              // whether some node of each warp's is none
  int32_t mask[S::kStages];
  int32_t holes;  // whether some node is none

  __device__ __forceinline__ float* floats() { return reinterpret_cast<float*>(tiles); }
  __device__ __forceinline__ float2* ends() { return reinterpret_cast<float2*>(q); }  // the base of each row's softmax in powers of 2, and its sum
  static_assert(S::kQueries * kPitch * 4 <= sizeof(tiles));
};

// The barriers, before anybody uses them; one thread calls it. A tile's keys come with its mark; each warp says when it is done with them,
// its mates' too.
template <class S>
__device__ __forceinline__ void init_cache_barriers(Shared<S>& shared) {
  for (int s = 0; s < S::kStages; ++s) {
    barrier_init(&shared.full[0][s], 2);
    barrier_init(&shared.full[1][s], 1);
    for (int part = 0; part < 2; ++part) barrier_init(&shared.empty[part][s], S::kMates * S::kQueries / 16);
  }
  barrier_init(&shared.q_full, 1);
  barrier_init(&shared.words_full, S::kHelpers / 32);
  barriers_ready();
  fence_async();
}

// What all threads but those of the first warp bring before the first product: the queries, the words of their ancestors, and which nodes
// there are. Asked for at once; `keep` waits.
template <class S, typename T>
struct Helper {
  static constexpr int kNodes = (1024 + S::kHelpers - 1) / S::kHelpers, kBatch = 2;
  const Place<S>& place;
  const Decode& d;
  const int thread = threadIdx.x - 32, warp = thread / 32, lane = thread % 32;
  const int pitch, count;  // of the words that are kept: a row has one more than there are, for the shift
  const uint64_t* first;   // of the block's first query
  uint32_t nodes[kNodes];  // the bytes that say of the nodes with this thread's numbers whether they are their own ancestors
  uint64_t own[kBatch], before[kBatch];  // ancestor words: at this thread's places, and the ones before
  int word[kBatch];                      // where these places are in their rows

  __device__ explicit Helper(const Place<S>& place)
      : place(place), d(place.d), pitch(d.words + 1), count(place.queries * pitch),
        first(ancestors_of(d, place.batch) + int64_t{place.first_query} * d.words) {
    if (!d.ancestors || thread < 0) return;
    ask(0);
    const uint8_t* node = reinterpret_cast<const uint8_t*>(ancestors_of(d, place.batch) + int64_t{thread} * d.words) + thread / 8;
#pragma unroll
    for (int i = 0; i < kNodes && i * S::kHelpers < d.q_len; ++i, node += S::kHelpers * 8 * d.words + S::kHelpers / 8)
      if (i * S::kHelpers + thread < d.q_len) nodes[i] = *node;
  }

  __device__ __forceinline__ void ask(int begin) {
#pragma unroll
    for (int i = 0; i < kBatch && begin + i * S::kHelpers < count; ++i) {
      const int n = begin + i * S::kHelpers + thread, query = static_cast<int>((n + 0.5f) / pitch);
      const uint64_t* at = first + (n - query);
      word[i] = n - query * pitch;
      own[i] = n < count && word[i] < d.words ? at[0] : 0;
      before[i] = n < count && word[i] > 0 ? at[-1] : 0;
    }
  }

  // As the tensor copy engine would lay them out; where it does not.
  __device__ __forceinline__ void copy_queries(Shared<S>& shared) const {
    constexpr int kPieces = S::kDim / 8;  // of 16 bytes, a row
    if (thread < 0) return;
    const uint32_t to = sm80::shared_address(shared.q);
#pragma unroll 3
    for (int n = thread; n < S::kQueries * kPieces; n += S::kHelpers) {
      const int local = n / kPieces, piece = n % kPieces;
      const bool real = place.first_row + local < place.rows && 8 * piece < d.head_dim;
      const T* from = decoding::row_of<T>(d, d.q, place.batch, place.kv_head, real ? place.first_row + local : 0) + (real ? 8 * piece : 0);
      sm80::copy_16(to + piece / 8 * S::kQueryBlock + local * 128 + (piece % 8 ^ local % 8) * 16, from, real);
    }
    sm80::copies_commit();
  }

  __device__ __forceinline__ void keep(Shared<S>& shared, int prefix) {
    if (d.ancestors) keep_words(shared, prefix);
    sm80::copies_wait<0>();
    fence_async();
    named_sync<S::kHelpers>(kHelpersMeet);
    if (lane == 0) barrier_arrive(&shared.words_full);
  }

  __device__ __forceinline__ void keep_words(Shared<S>& shared, int prefix) {
    const bool wanted = place.has_words(prefix);
    const int shift = prefix & 63;
    const uint64_t last = low_bits(d.q_len - 64 * (d.words - 1));
    uint32_t mine = 0, used = 0;  // words
    for (int begin = 0;;) {
#pragma unroll
      for (int i = 0; i < kBatch && begin + i * S::kHelpers < count; ++i) {
        const uint64_t high = word[i] < d.words - 1 ? own[i] : own[i] & last, low = word[i] < d.words ? before[i] : before[i] & last;
        if (high) mine |= 1u << word[i];
        if (const int n = begin + i * S::kHelpers + thread; wanted && n < count)
          shared.words[n] = high << shift | (word[i] ? low >> 1 >> (63 - shift) : low_bits(shift));
      }
      if ((begin += kBatch * S::kHelpers) >= count) break;
      ask(begin);
    }
#pragma unroll 1
    for (int w = 0; w < d.words; ++w) used |= __ballot_sync(~0u, mine >> w & 1) ? 1u << w : 0;
    bool missing = false;
#pragma unroll
    for (int i = 0; i < kNodes && i * S::kHelpers < d.q_len; ++i)
      if (const int node = i * S::kHelpers + thread; node - lane < d.q_len) {
        const uint32_t bits = __ballot_sync(~0u, node >= d.q_len || nodes[i] >> (node % 8) & 1);
        if (lane == 0) shared.alive[node / 32] = bits;
        missing |= bits != ~0u;
      }
    if (lane == 0) shared.used[warp] = used, shared.missing[warp] = missing;
  }
};

// Whether a new key is a node's, or there is no tree, or the key is not new.
template <class S>
__device__ __forceinline__ bool is_alive(const Decode& d, const Shared<S>& shared, int node) {
  return !d.ancestors || node < 0 || node >= d.q_len || shared.alive[node / 32] >> (node % 32) & 1;
}

// Under windows and tables of pages, and where words found no room: asked of device memory. One piece of code for all words of a tile.
template <int kKeys>
__device__ __noinline__ uint64_t seen_anyhow(const Decode& d, int batch, int length, int query, int key) {
  const Span<kKeys> span(d, length, ~0u, batch, 0, 0, 1);
  const int base = key - span.prefix;
  return span.seen(query, span.depth(query), base, span.words_of(query, base));
}

template <int kKeys>
__device__ __noinline__ bool kept_anyhow(const Decode& d, int batch, int length, int key) {
  return Span<kKeys>(d, length, ~0u, batch, 0, 0, 1).kept(key);
}

}  // namespace sparse_attention::sm90
