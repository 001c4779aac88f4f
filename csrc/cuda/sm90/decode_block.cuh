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
  static constexpr int kHelpers = kThreads - 32;  // all but the warp that copies keys
  static constexpr int kResident = kRows == 64 ? 2 : 1, kFewer = 56, kMore = kRows == 64 ? 200 : 224;  // blocks at once; registers
};

// Where a block stands in the grid: (splits * mates, row tiles / mates * kv_heads, batch). Of all heads those tiles first that see most keys.
template <class S>
struct Place {
  const Decode& d;
  const int batch, kv_head, mate, split, first_row, rows;  // rows: of the group of heads

  __device__ explicit Place(const Decode& d) : Place(d, uint64_t{blockIdx.y} * d.kv_inverse >> 32) {}
  __device__ Place(const Decode& d, int turn)
      : d(d), batch(blockIdx.z), kv_head(blockIdx.y - turn * d.kv_heads), mate(blockIdx.x % S::kMates), split(blockIdx.x / S::kMates),
        first_row(((d.group * d.q_len - 1) / S::kQueries - turn * S::kMates - mate) * S::kQueries), rows(d.group * d.q_len) {}

  // Whether tiles are known without the length.
  __device__ __forceinline__ bool plain() const { return d.window < 0 && !d.block_table; }
  __device__ __forceinline__ int first_query() const { return query_of_row(d, first_row); }
  __device__ __forceinline__ int queries() const { return query_of_row(d, min(rows, first_row + S::kQueries) - 1) + 1 - first_query(); }
  // The first row of the last tile among the block's and its mates'.
  __device__ __forceinline__ int last_tile() const { return first_row + mate * S::kQueries; }
  // Whether what the queries see of the new keys is in shared memory.
  __device__ __forceinline__ bool has_words(int prefix) const {
    return d.ancestors && plain() && prefix >= 0 && queries() * (d.words + 1) <= S::kWords;
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
  alignas(1024) uint8_t k[S::kStages][S::kBlocks * S::kKeyBlock];
  alignas(1024) uint8_t v[S::kStages][S::kBlocks * S::kKeyBlock];
  uint64_t k_full[S::kStages], k_empty[S::kStages], v_full[S::kStages], v_empty[S::kStages], q_full, words_full;
  uint64_t words[kWords];                         // [queries, d.words + 1]; bit 0 of the first is a key whose number is a multiple of 64
  uint32_t used[S::kHelpers / 32], alive[32];     // words that some query of each warp's sees; nodes that there are
  int32_t missing[S::kHelpers / 32];              // whether some node of each warp's is none
  int32_t mask[S::kStages];
  int32_t holes;  // whether some node is none

  __device__ __forceinline__ float* floats() { return reinterpret_cast<float*>(k); }
  __device__ __forceinline__ float2* ends() { return reinterpret_cast<float2*>(q); }  // the base of each row's softmax in powers of 2, and its sum
  static_assert(S::kQueries * kPitch * 4 <= 2 * sizeof(k));
};

// The barriers, before anybody uses them; one thread calls it. A tile's keys come with its mark; each warp says when it is done with them,
// its mates' too.
template <class S>
__device__ __forceinline__ void init_cache_barriers(Shared<S>& shared) {
  for (int s = 0; s < S::kStages; ++s) {
    barrier_init(&shared.k_full[s], 2);
    barrier_init(&shared.v_full[s], 1);
    barrier_init(&shared.k_empty[s], S::kMates * S::kQueries / 16);
    barrier_init(&shared.v_empty[s], S::kMates * S::kQueries / 16);
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
  static constexpr int kWarps = S::kHelpers / 32, kNodes = (1024 + S::kHelpers - 1) / S::kHelpers, kBatch = 3;
  const Place<S>& place;
  const Decode& d;
  const int thread = threadIdx.x - 32, warp = thread / 32, lane = thread % 32;
  const int first_query, queries;
  uint64_t node_words[kNodes];           // of the nodes with this thread's numbers: whether they are their own ancestors
  uint64_t own[kBatch], before[kBatch];  // words of a query's ancestors: the lane's, and the one before

  __device__ explicit Helper(const Place<S>& place) : place(place), d(place.d), first_query(place.first_query()), queries(place.queries()) {
    if (!d.ancestors || thread < 0) return;
    ask(warp);
    const uint64_t* const ancestors = ancestors_of(d, place.batch);
#pragma unroll
    for (int i = 0; i < kNodes; ++i)
      if (const int node = i * S::kHelpers + thread; node < d.q_len) node_words[i] = ancestors[int64_t{node} * d.words + node / 64];
  }

  __device__ __forceinline__ void ask(int begin) {
    const uint64_t* const ancestors = ancestors_of(d, place.batch);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int query = begin + i * kWarps;
      const uint64_t* row = ancestors + int64_t{first_query + query} * d.words;
      own[i] = query < queries && lane < d.words ? row[lane] : 0;
      before[i] = query < queries && lane > 0 && lane <= d.words ? row[lane - 1] : 0;
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
    const int shift = prefix & 63, last = d.q_len - 64 * lane;
    uint32_t used = 0;
    for (int begin = warp;;) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const uint64_t mine = own[i] & low_bits(last), low = lane ? (before[i] & low_bits(last + 64)) >> 1 >> (63 - shift) : low_bits(shift);
        used |= __ballot_sync(~0u, mine != 0);
        if (const int query = begin + i * kWarps; wanted && query < queries && lane <= d.words) shared.words[query * (d.words + 1) + lane] = mine << shift | low;
      }
      if ((begin += kBatch * kWarps) >= queries) break;
      ask(begin);
    }
    bool missing = false;
#pragma unroll
    for (int i = 0; i < kNodes; ++i)
      if (const int node = i * S::kHelpers + thread; node - lane < d.q_len) {
        const uint32_t bits = __ballot_sync(~0u, node >= d.q_len || node_words[i] >> (node % 64) & 1);
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
