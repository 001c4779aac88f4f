// Walks down a tree's links, each of at most N steps, and what they leave.
#pragma once
#include <algorithm>
#include <vector>

#include "eagle.h"

namespace sparse_attention::eagle {

struct Walk {
  const WalkIn& in;
  int64_t b, node = 0, length = 1, steps = 0;  // length: nodes of the path, the root included
  int64_t* path;                               // row b of accept_index
  int64_t *predicts, child = -1;

  Walk(const WalkIn& in, const WalkOut& out, int64_t b)
      : in(in), b(b), path(out.accept_index + b * out.columns), predicts(out.predicts + b * in.nodes) {
    std::fill(path, path + out.columns, -1);
    std::fill(predicts, predicts + in.nodes, -1);
    path[0] = 0;
    limit = out.columns;
  }
  bool full() const { return length == limit; }
  int64_t token(int64_t n) const { return in.draft_tokens[b * in.nodes + n]; }
  // The children of the present node, one after the other, then -1.
  int64_t first() { return step(in.first_child[b * in.nodes + node]); }
  int64_t next() { return step(in.next_sibling[b * in.nodes + child]); }
  void accept() {
    predicts[node] = token(child);
    path[length++] = node = child;
  }
  void finish(const WalkOut& out, int64_t next_token) {
    predicts[node] = next_token;
    out.next_token[b] = next_token;
    out.accept_length[b] = length - 1;
    if (!out.best_candidate) return;
    const int64_t* rows = in.retrieve + b * in.retrieve_rows * in.retrieve_columns;
    int64_t best = 0;
    if (length <= in.retrieve_columns)
      for (int64_t r = 0; r < in.retrieve_rows; ++r)
        if (rows[r * in.retrieve_columns + length - 1] == node) {
          best = r;
          break;
        }
    out.best_candidate[b] = best;
  }

 private:
  int64_t limit;
  int64_t step(int64_t link) {
    if (link < 0 || link >= in.nodes || steps == in.nodes) return child = -1;
    ++steps;
    return child = link;
  }
};

// Whether a link leaves the tree or leads where another one does, or to the root.
inline bool links_malformed(const WalkIn& in) {
  std::vector<uint8_t> met(in.nodes);
  for (int64_t b = 0; b < in.batch; ++b) {
    std::fill(met.begin(), met.end(), 0);
    met[0] = 1;
    for (const int64_t* links : {in.first_child, in.next_sibling})
      for (int64_t n = 0; n < in.nodes; ++n) {
        const int64_t link = links[b * in.nodes + n];
        if (link == -1) continue;
        if (link < 0 || link >= in.nodes || met[link]) return true;
        met[link] = 1;
      }
  }
  return false;
}

}  // namespace sparse_attention::eagle
