// How the passes of the tile engine walk a layout: the list of work items, and the live rows of one visited tile.
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

#include "../params.h"
#include "gemm.h"

namespace sparse_attention {

// One lane-side tile of one view of one head; independent of all others.
struct Item {
  int32_t batch, head;
  const View* view;
  int32_t tile;  // tile number inside the view
  int32_t cost;  // visited tiles
};

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Items of all heads, longest first (stable, so that equal neighbours stay neighbours in the cache). `lane_count` says how many
// lanes a view has: its queries, or its keys when the layout is transposed.
template <class LaneCount>
inline std::vector<Item> work_items(const LayoutParams& layout, int batch, int heads, LaneCount lane_count) {
  std::vector<Item> items;
  for (int b = 0; b < batch; ++b)
    for (int h = 0; h < heads; ++h) {
      const int variant = layout.head_variant[h];
      for (int x = layout.variant_views[variant]; x < layout.variant_views[variant + 1]; ++x) {
        const View& view = layout.views[x];
        const int tiles = ceil_div(lane_count(view), kTile);
        for (int t = 0; t < tiles; ++t) {
          int32_t cost = 0;
          for (int e = layout.row_start[view.row_base + t]; e < layout.row_start[view.row_base + t + 1]; ++e)
            cost += layout.runs[e].count;
          items.push_back({b, h, &view, t, cost});
        }
      }
    }
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });
  return items;
}

// Multiply-adds that are worth waking other threads for: about 10 us of one core, twice what waking costs.
constexpr int64_t kWorthThreads = 500'000;

// Calls body(item, scratch) for each item on all threads; `Scratch` is made once a thread. `madds` is the work of one tile.
template <class Scratch, class MakeScratch, class Body>
inline void for_each_item(const std::vector<Item>& items, int64_t madds, MakeScratch make_scratch, Body body) {
  const int64_t n = int64_t(items.size());
  int64_t tiles = 0;
  for (const Item& item : items) tiles += item.cost;
#pragma omp parallel if (n > 1 && tiles * madds > kWorthThreads)
  {
    Scratch scratch = make_scratch();
#pragma omp for schedule(dynamic, 1)
    for (int64_t x = 0; x < n; ++x) body(items[x], scratch);
  }
}

// Multiply-adds of `products` products over one tile of a problem of these sizes.
inline int64_t tile_madds(int products, int q_len, int kv_len, int dim) {
  return int64_t(products) * std::min(kTile, q_len) * std::min(kTile, kv_len) * dim;
}

// The live rows of a visited tile and, for each group of lanes, the interval of them that the group needs.
template <class A>
struct Block {
  int first;            // first live row of the view's sequence
  int n;                // live rows
  bool masked, packed;  // packed: the live rows are not consecutive, `index` lists them
  int index[kTile];     // row inside the tile of each live row
  uint64_t word[kTile];  // lanes that each live row meets (masked only)
  int low[kGroups<A>], high[kGroups<A>];

  // Rows [tile * kTile, rows) that meet at least one of `lanes` lanes; false when there are none.
  bool select(int tile, int rows, const uint64_t* mask, int groups) {
    constexpr int L = Simd<A>::lanes;
    const int count = std::min(kTile, rows - tile * kTile);
    first = tile * kTile;
    masked = mask != nullptr;
    packed = false;
    if (!masked) {
      n = count;
      for (int g = 0; g < groups; ++g) low[g] = 0, high[g] = n;
      return n > 0;
    }
    const uint64_t lanes = groups * L >= 64 ? ~uint64_t(0) : (uint64_t(1) << (groups * L)) - 1;
    n = 0;
    for (int r = 0; r < count; ++r)
      if (const uint64_t bits = mask[r] & lanes) {
        index[n] = r;
        word[n++] = bits;
      }
    if (n == 0) return false;
    packed = index[n - 1] - index[0] != n - 1;
    first += packed ? 0 : index[0];
    for (int g = 0; g < groups; ++g) {
      const uint64_t bits = (L == 64 ? ~uint64_t(0) : (uint64_t(1) << L) - 1) << (g * L);
      low[g] = n, high[g] = 0;
      for (int r = 0; r < n; ++r)
        if (word[r] & bits) low[g] = std::min(low[g], r), high[g] = r + 1;
      if (high[g] == 0) low[g] = 0;
    }
    return true;
  }

  uint32_t bits(int row, int group) const { return uint32_t(word[row] >> (group * Simd<A>::lanes)); }

  int row(int r) const { return packed ? first + index[r] : first + r; }
};

// Rows as the products read them: in place when the storage type is the accumulator's, else widened into scratch.
template <class A>
struct Rows {
  const A* data;
  int64_t stride;
};

template <class T, class A>
inline Rows<A> block_rows(const T* base, int64_t stride, const Block<A>& block, int dim, A* scratch) {
  if constexpr (std::is_same_v<T, A>)
    if (!block.packed) return {base + block.first * stride, stride};
  for (int r = 0; r < block.n; ++r) widen(base + block.row(r) * stride, scratch + r * dim, dim);
  return {scratch, dim};
}

// packed[d][lane] = row_lane[d] * factor for `lanes` rows; the other lanes are 0.
template <class T, class A>
inline void pack(const T* base, int64_t stride, int lanes, int dim, A factor, A* packed) {
  for (int l0 = 0; l0 < kTile; l0 += 8)
    for (int d0 = 0; d0 < dim; d0 += 8) {
      A block[8][8] = {};
      for (int l = 0; l < 8 && l0 + l < lanes; ++l) {
        widen(base + (l0 + l) * stride + d0, block[l], 8);
        for (int d = 0; d < 8; ++d) block[l][d] *= factor;
      }
      transpose8(block);
      for (int d = 0; d < 8; ++d) std::memcpy(packed + (d0 + d) * kTile + l0, block[d], sizeof(block[d]));
    }
}

// row_lane[d] = packed[d][lane] * factor[lane] for `lanes` rows.
template <class A, class T>
inline void unpack(const A* packed, const A* factor, int lanes, int dim, T* base, int64_t stride) {
  for (int l0 = 0; l0 < lanes; l0 += 8)
    for (int d0 = 0; d0 < dim; d0 += 8) {
      A block[8][8];
      for (int d = 0; d < 8; ++d)
        for (int l = 0; l < 8; ++l) block[d][l] = packed[(d0 + d) * kTile + l0 + l] * factor[l0 + l];
      transpose8(block);
      for (int l = 0; l < 8 && l0 + l < lanes; ++l) narrow(block[l], base + (l0 + l) * stride + d0, 8);
    }
}

template <class T>
inline T* head_data(const Tensor4& x, int batch, int head) {
  return static_cast<T*>(x.data) + batch * x.batch + head * x.head;
}

// The rows of one view of one head: element (s, d) is at data[s * stride + d].
template <class T>
struct Sequence {
  T* data;
  int64_t stride;
};

template <class T>
inline Sequence<T> sequence(const Tensor4& x, int batch, int head, int first, int stride) {
  return {head_data<T>(x, batch, head) + first * x.row, stride * x.row};
}

// 64-byte aligned scratch of one thread.
template <class A>
struct Arena {
  explicit Arena(size_t n) : memory(static_cast<A*>(::operator new[](n * sizeof(A), std::align_val_t(64)))) {}
  Arena(Arena&& other) : memory(other.memory), used(other.used) { other.memory = nullptr; }
  ~Arena() { ::operator delete[](memory, std::align_val_t(64)); }
  A* take(size_t n) {
    A* p = memory + used;
    used += n;
    return p;
  }
  A* memory;
  size_t used = 0;
};

}  // namespace sparse_attention
