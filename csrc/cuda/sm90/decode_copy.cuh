// How a block's queries and key tiles come, and what is said of each tile: one thread's work.
#pragma once
#include "decode_block.cuh"

namespace sparse_attention::sm90 {

struct CacheMaps {
  CUtensorMap tiles[2];  // keys, values: (column, 0, row of a page, head, page); without pages a request is one page
  CUtensorMap q, out;    // (column, head of the group, query, KV head, request), in boxes of a block's rows and of 16,
  int32_t boxed;         // where 16 rows are whole queries
};

// Which tiles a block visits: every `splits`-th, so that its first ones do not depend on the length; and what is to be hidden of them.
template <class S>
struct Visits {
  Span<S::kKeys> span;
  const Place<S>& place;
  const bool plain;
  const int last;
  bool holes = false;

  __device__ Visits(const Place<S>& place, int length)
      : span(place.d, length, ~0u, place.batch, 0, place.last_tile(), S::kQueries), place(place), plain(place.plain()),
        last(max(span.visited, place.split + 1)) {}

  // The next visit, from this one on, to a tile of which something may be seen.
  __device__ __forceinline__ int next(int visit) const {
    if (span.used != ~0u)
      while (visit < last && !span.may_see(visit)) visit += place.d.splits;
    return visit;
  }

  // The call's last tile, if it is this block's and those from `visit` up to it are of the prefix; else -1.
  __device__ __forceinline__ int last_of_all(int visit) const {
    const int found = span.visited - 1, splits = place.d.splits;
    return plain && found > visit && (found - visit) % splits == 0 && !is_new(found - splits) ? found : -1;
  }

  // There always is a first one: a block without keys finds that it sees none of this tile's.
  __device__ __forceinline__ int first() const {
    const int visit = plain ? place.split : next(place.split);
    return visit < last ? visit : place.split;
  }

  __device__ __forceinline__ bool is_new(int visit) const { return (span.tile(visit) + 1) * S::kKeys > span.prefix; }

  // Whether a tile holds keys that nobody sees and whose values may be anything.
  __device__ __forceinline__ bool is_dead(int tile) const {
    const int begin = tile * S::kKeys, end = begin + S::kKeys;
    if (end > span.length || (holes && end > span.prefix)) return true;
    if (plain) return false;
    if (begin < span.low && end > place.d.sinks) return true;
    for (int key = begin; span.table && key < end; key += place.d.page)
      if (!span.there(key)) return true;
    return false;
  }

  __device__ __forceinline__ int mark(int visit) const {
    const int tile = span.tile(visit);
    return (plain ? !is_new(visit) : span.full(tile)) ? kFull : tile | (is_dead(tile) ? kDead : 0);
  }
};

// One thread copies keys or values of a tile in, or what one page holds of them: of mates each copies some columns, for all.
template <class S>
__device__ __forceinline__ void copy_rows(const Place<S>& place, const CUtensorMap* map, uint8_t* to, uint64_t* barrier, int row, int page) {
  const bool once = S::kQueries > 64 && reads_once(place.d, S::kMates * S::kQueries);  // a short cache is not read quicker under a policy
#pragma unroll
  for (int b = 0; b < S::kBlocks; ++b) {
    uint8_t* const box = to + b * S::kKeyBlock;
    if (S::kMates > 1) {
      if (b % S::kMates == place.mate)
        tensor_load_all(box, map, barrier, 64 * b, 0, row, place.kv_head, page,
                        once ? decoding::once_policy() : decoding::usual_policy(), S::kMates);
    } else if (once) {
      tensor_load(box, map, barrier, 64 * b, 0, row, place.kv_head, page, decoding::once_policy());
    } else {
      tensor_load(box, map, barrier, 64 * b, 0, row, place.kv_head, page);
    }
  }
}

template <class S>
__device__ __forceinline__ void copy_tile(const Place<S>& place, const CUtensorMap* map, uint8_t* to, uint64_t* barrier, int tile, int length) {
  const Decode& d = place.d;
  const int rows = d.block_table ? min(S::kKeys, d.page) : S::kKeys;
  barrier_expect(barrier, S::kBlocks * S::kKeyBlock);
#pragma unroll 1
  for (int row = 0; row < S::kKeys; row += rows) {
    int page = place.batch, at = tile * S::kKeys + row;
    if (d.block_table) {
      page = d.block_table[int64_t{place.batch} * d.table_width + max(0, min(at, length - 1)) / d.page];
      page = min(max(page, 0), d.pages - 1), at %= d.page;
    }
    copy_rows(place, map, to + row * 128, barrier, at, page);
  }
}

// Where whole queries are boxes.
template <class S>
__device__ __forceinline__ void copy_queries(const Place<S>& place, const CacheMaps& maps, Shared<S>& shared) {
  if (!maps.boxed) return;
  barrier_expect(&shared.q_full, S::kBlocks * S::kQueryBlock);
#pragma unroll
  for (int b = 0; b < S::kBlocks; ++b)
    tensor_load(shared.q + b * S::kQueryBlock, &maps.q, &shared.q_full, 64 * b, 0, place.first_query, place.kv_head, place.batch);
}

// One thread copies this block's key tiles in, and says of each what is to be hidden. The call's last tile, which has few keys and costs the
// time of many, comes as soon as all stages were filled once: then memory is what is waited for.
template <class S>
__device__ __forceinline__ void copy_cache(const Place<S>& place, const CacheMaps& maps, Shared<S>& shared, int length) {
  Ring<S::kStages> ring;
  Visits<S> visits(place, length);
  bool words = !place.d.ancestors;
  shared.holes = false;
  const auto wait_words = [&] {  // which of the new keys somebody sees
    barrier_wait(&shared.words_full, 0);
    uint32_t used = 0;
    for (int w = 0; w < S::kHelpers / 32; ++w) used |= shared.used[w], visits.holes |= shared.missing[w] != 0;
    shared.holes = visits.holes, words = true;
    if (S::kMates == 1) visits.span.used = used;  // mates visit the same tiles
  };
  if (!words && !visits.plain) wait_words();
  int end = visits.last, regular = 0;  // regular: the next one in order
  for (int visit = visits.first(), following, n = 0; visit >= 0; visit = following, ring.next(), ++n) {
    const int stage = ring.stage;
#pragma unroll 1
    for (int part = 0; part < 2; ++part) {  // keys, values
      barrier_wait(&shared.empty[part][stage], ring.phase ^ 1);
      copy_tile(place, &maps.tiles[part], shared.tiles[part][stage], &shared.full[part][stage], visits.span.tile(visit), visits.span.length);
      if (part) break;
      if (n != S::kStages || end == visits.last) regular = visit + place.d.splits;
      const int found = n + 1 == S::kStages ? visits.last_of_all(regular) : -1;
      if (!words && visits.is_new(min(max(found, regular), visits.last - 1))) wait_words();
      following = visits.next(regular);
      if (found >= 0) following = end = found;
      else if (following >= end) following = -1;
      shared.mask[stage] = visits.mark(visit) | (following < 0 ? kLast : 0);
      barrier_arrive(&shared.full[0][stage]);
    }
  }
}

}  // namespace sparse_attention::sm90
