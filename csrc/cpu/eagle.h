// The tree operations' entry points. No torch here. Every array is contiguous unless it has strides; indices are int64; a function
// that returns bool says whether its inputs were malformed: the results are then what docs/eagle.md says for check=False.
#pragma once
#include <cstdint>
#include <vector>

#include "engines.h"

namespace sparse_attention::eagle {

// What a DraftTree holds, of B requests and N nodes; `columns` of retrieve_indices. See docs/eagle.md.
struct TreeOut {
  int64_t batch, nodes, columns;
  int64_t *parents, *depths, *retrieve, *leaf_count, *width, *first_child, *next_sibling, *orphans;
  bool sorted;
};

// The order of sparse_attention.eagle.outputs.MASK_FORMS.
enum class Form { boolean, one_zero, additive, bits, bits32, full, none };

struct MaskOut {
  void* data;
  Form form;
  Dtype dtype;            // of the additive form
  const int64_t* prefix;  // [B], the full form's
};

bool select(Dtype, const void* scores, int64_t batch, int64_t candidates, int64_t total, int64_t* selected);
// Fills draft_tokens [B, N] and out.parents from candidates: tokens [B, F], parents [B, P].
bool resolve(const int64_t* selected, const int64_t* tokens, const int64_t* parents, const int64_t* root_tokens, int64_t candidates,
             int64_t rows, int64_t* draft_tokens, const TreeOut& out);
// Copies parents, with -1 where they are no lower index.
bool copy_parents(const int64_t* parents, int64_t batch, int64_t nodes, bool forest, int64_t* out);
// Everything else of a tree, from out.parents.
bool fill_tree(const TreeOut& out);
void fill_mask(const int64_t* parents, int64_t batch, int64_t nodes, const MaskOut& mask);

struct WalkIn {
  int64_t batch, nodes;
  const int64_t *draft_tokens, *first_child, *next_sibling, *retrieve;  // retrieve may be null
  int64_t retrieve_rows, retrieve_columns;
};
struct WalkOut {
  int64_t *accept_index, *accept_length, *predicts, *next_token, *best_candidate;  // best_candidate may be null
  int64_t columns;
  void* sample_p;  // may be null
};

// logits [B, N, vocab], or targets [B, N] and vocab 0.
bool verify_greedy(const WalkIn&, Dtype, const void* logits, const int64_t* targets, int64_t vocab, const WalkOut&);

struct Coins {
  const double *coins, *final_coins;  // [B, N] and [B], or null: then from seed and offset
  int64_t seed, offset;
  bool target_only;
  double threshold_single, threshold_acc;
};
bool verify_sampling(const WalkIn&, Dtype, const void* probs, int64_t vocab, const Coins&, const WalkOut&);

// Rows of a cache: sizes in elements of `bytes` bytes. dims: [layers, batch or pages, heads, rows, head_dim].
struct Rows5 {
  char* data;
  int64_t layers, batch, heads, rows;
  int64_t stride_layer, stride_batch, stride_head, stride_row;
};
// With `strict` a malformed request means that nothing is written at all, else that the request is left out.
bool append(const Rows5& cache, const Rows5& fresh, int64_t row_bytes, int64_t element, const int64_t* lengths, bool strict);
bool append_lengths(const int64_t* lengths, int64_t batch, int64_t count, int64_t rows, int64_t* out);
bool retrieve(const Rows5& cache, const int64_t* indices, int64_t count, int64_t row_bytes, int64_t element, char* out);

struct CommitIn {
  int64_t batch, width, rows, pages, page;  // block_table null: rows of the cache in `rows`
  const int64_t *lengths, *accept_index, *accept_length, *block_table;
  int64_t blocks, nodes;  // columns of the block table; nodes of hidden, or -1
};
// `valid` [B]: which requests are well formed. True if one is not.
bool commit_valid(const CommitIn&, const Rows5& like, uint8_t* valid);
void commit_rows(const CommitIn&, const std::vector<Rows5>& layers, int64_t row_bytes, int64_t element, const uint8_t* valid);
void commit_hidden(const CommitIn&, const char* hidden, int64_t row_bytes, char* out, int64_t* lengths_out, const uint8_t* valid);

bool logsoftmax_topk(Dtype, const void* logits, int64_t rows, int64_t vocab, int64_t k, const int64_t* d2t, void* values, int64_t* tokens);
struct FrontierOut {
  void *cumulative, *scores;
  int64_t *index, *rows, *tokens, *parents;  // tokens and parents may be null
};
bool cumulative_topk(Dtype, const void* log_probs, const void* scores, const int64_t* tokens, int64_t batch, int64_t rows, int64_t width,
                     int64_t k, int64_t first_parent, const FrontierOut&);

}  // namespace sparse_attention::eagle
