// The decode engine: tiles of queries that share their keys, each split over its keys into items, and the exact merge of the items
// (Flash-Decoding, Dao et al. 2023). How a tile is split depends on sizes only, so results do not depend on the number of threads.
#pragma once
#include <deque>
#include <vector>

#include "decode_lanes.h"
#include "decode_pairs.h"
#include "decode_rows.h"

namespace sparse_attention::decoding {

// Up to here the row-wise way is faster: measured on Zen 4 over 2,048 keys of 128 dimensions, with AVX-512 and AVX2. Row by row a narrow
// type is widened again for each query.
template <class T>
constexpr int kFewQueries = Simd<Acc<T>>::lanes / (std::is_same_v<T, Acc<T>> ? 2 : 3);

constexpr int kItems = 64;      // items to aim at
constexpr int kItemBlocks = 16;  // fewest blocks of a split: less is not worth a merge

struct Item {
  int tile, from, to, part;  // blocks [from, to); part: -1, or where the result waits for the merge
};

struct Plan {
  std::deque<Request> requests;
  std::vector<Tile> tiles;
  std::vector<Item> items;
  std::vector<int> split;  // the first items of the tiles that need a merge
  int parts = 0, most_queries = 0;
  int64_t blocks = 0;

  explicit Plan(const DecodeParams& p) {
    const int queries = p.heads / p.kv_heads * p.q_len;
    const int per_head = ceil_div(queries, kLanes);
    most_queries = std::min(queries, kLanes);
    tiles.reserve(size_t(p.batch) * p.kv_heads * per_head);
    for (int b = 0; b < p.batch; ++b) {
      const Request& request = requests.emplace_back(p, b);
      for (int head = 0; head < p.kv_heads; ++head)
        for (int x = 0; x < per_head; ++x)
          if (head) {
            tiles.push_back(tiles[tiles.size() - per_head]);
            tiles.back().kv_head = head;
          } else {
            tiles.emplace_back(p, request, b, head, x * kLanes, std::min(kLanes, queries - x * kLanes));
          }
    }
    for (const Tile& tile : tiles) blocks += tile.blocks();
    const int64_t wanted = std::max<int64_t>(kItemBlocks, (blocks + kItems - 1) / kItems);
    for (int t = 0; t < int(tiles.size()); ++t) {
      const int count = tiles[t].blocks(), splits = int(std::max<int64_t>(1, (count + wanted / 2) / wanted));
      if (splits > 1) split.push_back(int(items.size()));
      for (int s = 0; s < splits; ++s)
        items.push_back({t, int(int64_t(count) * s / splits), int(int64_t(count) * (s + 1) / splits), splits > 1 ? parts++ : -1});
    }
  }
};

// Where the results of items wait: a slot for each.
template <class A>
struct Slots {
  Slots(int parts, int queries, int dim) : queries(queries), dim(dim), arena(std::max<size_t>(1, size_t(parts) * queries * (dim + 2))) {}
  Partial<A> at(int part) const {
    A* rows = arena.memory + size_t(part) * queries * (dim + 2);
    return {rows, rows + size_t(queries) * dim, rows + size_t(queries) * (dim + 1)};
  }
  void keep(int part, const Partial<A>& found, int count) const {
    const Partial<A> to = at(part);
    std::copy_n(found.rows, size_t(count) * dim, to.rows);
    std::copy_n(found.maximum, count, to.maximum);
    std::copy_n(found.sum, count, to.sum);
  }
  int queries, dim;
  Arena<A> arena;
};

// Query l of the tile whose items start at `first`: each part weighs e^(its maximum - the largest).
template <class T>
inline void merge(const DecodeParams& p, const Plan& plan, const Slots<Acc<T>>& slots, const Item* first, const Item* last, int l) {
  using A = Acc<T>;
  A top = -kInfinity<A>, sum = 0;
  A row[256] = {};
  for (const Item* item = first; item < last; ++item) top = std::max(top, slots.at(item->part).maximum[l]);
  for (const Item* item = first; item < last; ++item) {
    const Partial<A> part = slots.at(item->part);
    if (part.sum[l] == A(0)) continue;
    const A weight = std::exp(part.maximum[l] - top);
    sum += weight * part.sum[l];
    for (int d = 0; d < p.head_dim; ++d) row[d] += weight * part.rows[int64_t(l) * p.head_dim + d];
  }
  write<T>(p, plan.tiles[first->tile], l, row, top, sum);
}

// run(tile, from, to, scratch) -> Partial, for each item.
template <class T, class Scratch, class Run>
inline void run_items(const DecodeParams& p, const Plan& plan, Run run) {
  const Slots<Acc<T>> slots(plan.parts, plan.most_queries, p.head_dim);
  const int64_t madds = plan.blocks * kKeys * plan.most_queries * 2 * p.head_dim;
  const int items = int(plan.items.size()), splits = int(plan.split.size());
#pragma omp parallel if (items > 1 && madds > kWorthThreads)
  {
    Scratch scratch(p.head_dim);
#pragma omp for schedule(dynamic, 1)
    for (int x = 0; x < items; ++x) {
      const Item& item = plan.items[x];
      const Tile& tile = plan.tiles[item.tile];
      const Partial<Acc<T>> found = run(tile, item.from, item.to, scratch);
      if (item.part >= 0)
        slots.keep(item.part, found, tile.count);
      else
        for (int l = 0; l < tile.count; ++l)
          write<T>(p, tile, l, found.rows + int64_t(l) * p.head_dim, found.maximum[l], found.sum[l]);
    }
#pragma omp for schedule(dynamic, 1)
    for (int x = 0; x < splits; ++x) {
      const Item *first = &plan.items[plan.split[x]], *last = first;
      while (last < plan.items.data() + items && last->tile == first->tile) ++last;
      for (int l = 0; l < plan.tiles[first->tile].count; ++l) merge<T>(p, plan, slots, first, last, l);
    }
  }
}

}  // namespace sparse_attention::decoding

namespace sparse_attention {

template <class T>
void decode_forward(const DecodeParams& p) {
  using namespace decoding;
  const Plan plan(p);
  if (plan.most_queries <= kFewQueries<T>)
    return gather::with_dim(p.head_dim, [&](auto dim) {
      run_items<T, RowsScratch<Acc<T>>>(
          p, plan, [&](const Tile& tile, int from, int to, auto& scratch) { return rows_item<T>(p, tile, from, to, dim, scratch); });
    });
  auto run = lanes_item<T, WideProducts<T>>;
#ifdef SPARSE_ATTENTION_PAIRS
  if constexpr (std::is_same_v<T, BFloat16>)
    if (PairProducts::apply(p)) run = lanes_item<T, PairProducts>;
#endif
  run_items<T, LanesScratch<Acc<T>>>(
      p, plan, [&](const Tile& tile, int from, int to, auto& scratch) { return run(p, tile, from, to, scratch); });
}

}  // namespace sparse_attention
