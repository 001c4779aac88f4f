// A tree from its parents: depths, links, the rows of paths, and the mask.
#include <algorithm>
#include <cstring>
#include <limits>

#include "eagle.h"
#include "simd.h"

namespace sparse_attention::eagle {
namespace {

// First child and next sibling of every node; later nodes first, so that siblings ascend. Returns the nodes but 0 that have no parent.
int64_t link(const int64_t* parents, int64_t nodes, int64_t* first_child, int64_t* next_sibling) {
  std::fill(first_child, first_child + nodes, -1);
  std::fill(next_sibling, next_sibling + nodes, -1);
  int64_t orphans = 0;
  for (int64_t n = nodes - 1; n > 0; --n) {
    const int64_t parent = parents[n];
    if (parent < 0) {
      ++orphans;
      continue;
    }
    next_sibling[n] = first_child[parent];
    first_child[parent] = n;
  }
  return orphans;
}

// The leaf after `node` in depth-first order, from a node whose own subtree is to be entered; -1 after the last.
int64_t descend(const int64_t* first_child, int64_t node) {
  while (first_child[node] >= 0) node = first_child[node];
  return node;
}
int64_t next_leaf(const int64_t* parents, const int64_t* first_child, const int64_t* next_sibling, int64_t leaf) {
  for (int64_t node = leaf; node > 0; node = parents[node])
    if (next_sibling[node] >= 0) return descend(first_child, next_sibling[node]);
  return -1;
}

// Node n's row is its parent's and its own place: copy, then set.
template <class T, class Set>
void copy_rows(const int64_t* parents, int64_t nodes, T* rows, int64_t stride, int64_t width, T nothing, Set set) {
  for (int64_t n = 0; n < nodes; ++n) {
    T* row = rows + n * stride;
    if (parents[n] >= 0)
      std::memcpy(row, rows + parents[n] * stride, width * sizeof(T));
    else
      std::fill(row, row + width, nothing);
    set(row, n);
  }
}

template <class T>
void square(const int64_t* parents, int64_t nodes, void* data, int64_t b, T nothing, T one) {
  copy_rows(parents, nodes, static_cast<T*>(data) + b * nodes * nodes, nodes, nodes, nothing, [&](T* row, int64_t n) { row[n] = one; });
}

template <class W>
void packed(const int64_t* parents, int64_t nodes, void* data, int64_t b) {
  constexpr int width = sizeof(W) * 8;
  const int64_t words = (nodes + width - 1) / width;
  copy_rows(parents, nodes, static_cast<W*>(data) + b * nodes * words, words, words, W(0),
            [&](W* row, int64_t n) { row[n / width] |= W(1) << n % width; });
}

}  // namespace

bool resolve(const int64_t* selected, const int64_t* tokens, const int64_t* parents, const int64_t* root_tokens, int64_t candidates,
             int64_t rows, int64_t* draft_tokens, const TreeOut& out) {
  const int64_t total = out.nodes - 1, siblings = candidates / rows;
  bool malformed = false;
  for (int64_t b = 0; b < out.batch; ++b) {
    const int64_t* chosen = selected + b * total;
    int64_t* token = draft_tokens + b * out.nodes;
    int64_t* parent = out.parents + b * out.nodes;
    token[0] = root_tokens[b];
    parent[0] = -1;
    for (int64_t n = 0; n < total; ++n) {
      const int64_t place = std::clamp<int64_t>(chosen[n], 0, candidates - 1);
      token[n + 1] = tokens[b * candidates + place];
      const int64_t above = parents[b * rows + place / siblings];
      parent[n + 1] = -1;
      if (above == 0) {
        parent[n + 1] = 0;
      } else if (above > 0) {
        const int64_t slot = std::lower_bound(chosen, chosen + total, above - 1) - chosen;
        if (slot < n && chosen[slot] == above - 1) parent[n + 1] = slot + 1;
      }
      if (place != chosen[n]) parent[n + 1] = -1;
      malformed |= parent[n + 1] < 0 || (n > 0 && chosen[n] <= chosen[n - 1]);
    }
  }
  return malformed;
}

bool copy_parents(const int64_t* parents, int64_t batch, int64_t nodes, bool forest, int64_t* out) {
  bool malformed = false;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t n = 0; n < nodes; ++n) {
      const int64_t parent = parents[b * nodes + n];
      const bool lower = parent >= 0 && parent < n;
      malformed |= !lower && (parent != -1 || (n > 0 && !forest));
      out[b * nodes + n] = lower ? parent : -1;
    }
  return malformed;
}

bool fill_tree(const TreeOut& out) {
  const int64_t nodes = out.nodes, columns = out.columns;
  bool malformed = false;
#pragma omp parallel for reduction(|| : malformed) if (out.batch * nodes > 4096)
  for (int64_t b = 0; b < out.batch; ++b) {
    const int64_t* parents = out.parents + b * nodes;
    int64_t *depths = out.depths + b * nodes, *first_child = out.first_child + b * nodes, *next_sibling = out.next_sibling + b * nodes;
    const int64_t orphans = link(parents, nodes, first_child, next_sibling);
    for (int64_t n = 0; n < nodes; ++n) depths[n] = parents[n] >= 0 ? depths[parents[n]] + 1 : 0;
    int64_t* rows = out.retrieve + b * nodes * columns;
    std::fill(rows, rows + nodes * columns, -1);
    int64_t leaves = 0, deepest = 0;
    const auto write = [&](int64_t leaf) {
      int64_t* row = rows + leaves * columns;
      for (int64_t node = leaf; node >= 0; node = parents[node])
        if (depths[node] < columns) row[depths[node]] = node;
      deepest = std::max(deepest, depths[leaf]);
      ++leaves;
    };
    if (out.sorted) {
      for (int64_t leaf = descend(first_child, 0); leaf >= 0; leaf = next_leaf(parents, first_child, next_sibling, leaf)) write(leaf);
    } else {
      for (int64_t n = 0; n < nodes; ++n) {
        if (first_child[n] >= 0) continue;
        int64_t top = n;
        if (orphans > 0)
          while (parents[top] >= 0) top = parents[top];
        else
          top = 0;
        if (top == 0) write(n);
      }
    }
    out.leaf_count[b] = leaves;
    out.width[b] = deepest + 1;
    out.orphans[b] = orphans;
    malformed = malformed || orphans > 0 || deepest >= columns;
  }
  return malformed;
}

void fill_mask(const int64_t* parents, int64_t batch, int64_t nodes, const MaskOut& mask) {
  std::vector<int64_t> start(batch + 1, 0);
  if (mask.form == Form::full)
    for (int64_t b = 0; b < batch; ++b) start[b + 1] = start[b] + nodes * (mask.prefix[b] + nodes);
#pragma omp parallel for if (batch * nodes * nodes > 1 << 20)
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t* above = parents + b * nodes;
    switch (mask.form) {
      case Form::boolean: square<uint8_t>(above, nodes, mask.data, b, 0, 1); break;
      case Form::one_zero: square<float>(above, nodes, mask.data, b, 0.0f, 1.0f); break;
      case Form::additive:
        switch (mask.dtype) {
          case Dtype::f32: square<float>(above, nodes, mask.data, b, std::numeric_limits<float>::lowest(), 0.0f); break;
          case Dtype::f64: square<double>(above, nodes, mask.data, b, std::numeric_limits<double>::lowest(), 0.0); break;
          case Dtype::bf16: square<uint16_t>(above, nodes, mask.data, b, 0xff7f, 0); break;
          case Dtype::f16: square<uint16_t>(above, nodes, mask.data, b, 0xfbff, 0); break;
        }
        break;
      case Form::bits: packed<uint64_t>(above, nodes, mask.data, b); break;
      case Form::bits32: packed<uint32_t>(above, nodes, mask.data, b); break;
      case Form::full: {
        const int64_t prefix = mask.prefix[b], stride = prefix + nodes;
        uint8_t* rows = static_cast<uint8_t*>(mask.data) + start[b];
        for (int64_t n = 0; n < nodes; ++n) std::memset(rows + n * stride, 1, prefix);
        copy_rows<uint8_t>(above, nodes, rows + prefix, stride, nodes, 0, [](uint8_t* row, int64_t n) { row[n] = 1; });
        break;
      }
      case Form::none: break;
    }
  }
}

}  // namespace sparse_attention::eagle
