// The tree operations' launches. No torch here. Arrays are on the device, contiguous unless they have strides; indices are int64. Each
// launch returns a cudaError_t, allocates nothing and waits for nothing. Malformed values give what docs/eagle.md says for check=False.
#pragma once
#include <cstdint>

namespace sparse_attention::eagle {

enum class Dtype { f32, f64, bf16, f16 };
// The order of sparse_attention.eagle.outputs.MASK_FORMS.
enum class Form { boolean, one_zero, additive, bits, bits32, full, none };

// Prefix lengths of a full mask: on the device, or, of few requests, here.
struct Prefixes {
  static constexpr int kHere = 64;
  const int64_t* there;  // null: `here`
  int64_t here[kHere];
};
struct MaskOut {
  void* data;
  Form form;
  Dtype dtype;   // of the additive form
  int64_t size;  // elements of the full form: what does not fit is not written
  Prefixes prefix;
};

// What a DraftTree holds, of B requests and N nodes; `columns` of retrieve_indices.
struct TreeOut {
  int batch, nodes, columns;
  int64_t *parents, *depths, *retrieve, *leaf_count, *width, *first_child, *next_sibling, *orphans;
  bool sorted;
};

// Candidates to select from and resolve: scores [B, F] or null, selected [B, N - 1], tokens [B, F], parents [B, P].
struct Candidates {
  const void* scores;
  Dtype dtype;
  int64_t* selected;  // read, or written where scores are given
  const int64_t *tokens, *parents, *root_tokens;
  int count, rows;
  int64_t* draft_tokens;
};

int select(Dtype, const void* scores, int batch, int candidates, int total, int64_t* selected, void* stream);
int build(const Candidates&, const TreeOut&, const MaskOut&, void* stream);
int assemble(const int64_t* parents, const TreeOut&, const MaskOut&, void* stream);
int tree_mask(const int64_t* parents, int batch, int nodes, const MaskOut&, void* stream);
// Most nodes that a block's shared memory holds.
int most_nodes_of_a_tree();
int most_nodes_of_a_mask();

struct WalkIn {
  int batch, nodes;
  const int64_t *draft_tokens, *first_child, *next_sibling, *retrieve;  // retrieve may be null
  int retrieve_rows, retrieve_columns;
};
struct WalkOut {
  int64_t *accept_index, *accept_length, *predicts, *next_token, *best_candidate;  // best_candidate may be null
  int columns;
  void* sample_p;  // may be null
};

// logits [B, N, vocab]; or targets [B, N], and then no workspace.
int verify_greedy(const WalkIn&, Dtype, const void* logits, const int64_t* targets, int64_t vocab, const WalkOut&, void* workspace, void* stream);
int64_t greedy_workspace(const WalkIn&, Dtype, int64_t vocab);  // bytes, aligned to 16
int most_nodes_of_a_walk();

struct Coins {
  const double *coins, *final_coins;  // [B, N] and [B], or null: then from seed and offset, [1] each
  const int64_t *seed, *offset;
  bool target_only;
  double threshold_single, threshold_acc;
};
int verify_sampling(const WalkIn&, Dtype, const void* probs, int vocab, const Coins&, const WalkOut&, void* stream);
int most_nodes_of_a_sample();

// A cache [(layers,) batch or pages, heads, rows, head_dim], strides in bytes. Everything that it names is moved in units of `unit` bytes,
// 16, 8, 4 or 2, which divide every address.
struct Strides {
  int64_t layer, batch, head, row;
};
struct Append {
  char *cache[2], *fresh[2];  // of keys and of values
  Strides cache_strides[2], fresh_strides[2];
  int batch, heads, count, units;  // units of a row
  int64_t rows;
  const int64_t* lengths;
  int64_t* lengths_out;
};
int append(const Append&, int unit, void* stream);

struct Retrieve {
  char *cache[2], *out[2];  // out: [batch, heads, count, head_dim]
  Strides strides[2];
  int batch, heads, count, units;
  int64_t rows;
  const int64_t* indices;
};
int retrieve(const Retrieve&, int unit, void* stream);

// Caches of one geometry. Rows are read before they are written: up to kHeldRows in registers, more by way of `scratch`.
struct Commit {
  static constexpr int kCaches = 440, kHeldRows = 16;
  int batch, width, blocks;  // blocks: columns of block_table
  int caches, layers, heads, units;
  Strides strides;
  int64_t rows, page, pages;  // rows that a request can have; the last two with a block_table
  const int64_t *lengths, *accept_index, *accept_length, *block_table;
  int64_t* lengths_out;  // null: another launch of the commit writes it and the hidden rows
  const char* hidden;    // [batch, nodes, hidden_bytes]
  char* hidden_out;      // [batch, width, hidden_bytes], or null
  int64_t nodes, hidden_bytes;  // nodes is -1 without hidden, everywhere
  char* scratch;                // [width, batch, caches * layers * heads * units] units; null where width is at most kHeldRows
  char* cache[kCaches];
};
int commit(const Commit&, int unit, void* stream);

constexpr int kMostBest = 2048;  // most that a draft step chooses
int logsoftmax_topk(Dtype, const void* logits, int rows, int vocab, int k, const int64_t* d2t, void* values, int64_t* tokens, void* stream);
struct Frontier {
  const void *log_probs, *scores;
  const int64_t* tokens;
  int batch, rows, width, k;
  int64_t first_parent;
  void *cumulative, *best;
  int64_t *index, *index_rows, *chosen, *parents;  // chosen and parents may be null
};
int cumulative_topk(Dtype, const Frontier&, void* stream);

}  // namespace sparse_attention::eagle
