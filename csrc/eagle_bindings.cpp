// The tree operations between Python and csrc/cpu: shapes are checked again, so that no call can write outside a tensor.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <vector>

#include "cpu/eagle.h"

namespace sparse_attention::bindings {

using at::Tensor;
using Maybe = std::optional<Tensor>;
Dtype dtype_of(const Tensor& x);

namespace {

const Tensor& checked(const Tensor& x, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK(x.device().is_cpu() && x.is_contiguous() && x.sizes() == shape, name, " must be a contiguous CPU tensor of shape ", shape,
              ", got ", x.sizes());
  return x;
}

int64_t* longs(const Tensor& x, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK(x.scalar_type() == at::kLong, name, " must be int64, got ", x.scalar_type());
  return checked(x, name, shape).data_ptr<int64_t>();
}
int64_t* longs(const Maybe& x, const char* name, at::IntArrayRef shape) { return x ? longs(*x, name, shape) : nullptr; }

// Runs without the interpreter's lock, with torch's number of threads.
template <class Run>
auto unlocked(Run run) {
  py::gil_scoped_release release;
  at::get_num_threads();
  return run();
}

eagle::MaskOut mask_of(const Maybe& mask, int64_t form, const Maybe& prefix, int64_t batch, int64_t nodes) {
  using eagle::Form;
  TORCH_CHECK(form >= 0 && form <= int64_t(Form::none), "form is ", form);
  eagle::MaskOut out{nullptr, Form(form), Dtype::f32, nullptr};
  if (out.form == Form::none) return out;
  TORCH_CHECK(mask, "a mask of this form needs a tensor");
  const auto is = [&](at::ScalarType type, at::IntArrayRef shape) {
    TORCH_CHECK(mask->scalar_type() == type, "mask must be ", type, ", got ", mask->scalar_type());
    checked(*mask, "mask", shape);
  };
  switch (out.form) {
    case Form::boolean: is(at::kBool, {batch, nodes, nodes}); break;
    case Form::one_zero: is(at::kFloat, {batch, 1, nodes, nodes}); break;
    case Form::additive:
      is(mask->scalar_type(), {batch, 1, nodes, nodes});
      out.dtype = dtype_of(*mask);
      break;
    case Form::bits: is(at::kLong, {batch, nodes, (nodes + 63) / 64}); break;
    case Form::bits32: is(at::kInt, {batch, nodes, (nodes + 31) / 32}); break;
    case Form::full: {
      is(at::kBool, {mask->numel()});
      TORCH_CHECK(prefix, "a full mask needs prefix");
      out.prefix = longs(prefix, "prefix", {batch});
      int64_t size = 0;
      for (int64_t b = 0; b < batch; ++b) {
        TORCH_CHECK(out.prefix[b] >= 0, "prefix is ", out.prefix[b]);
        size += nodes * (out.prefix[b] + nodes);
      }
      TORCH_CHECK(mask->numel() >= size, "the full mask has ", mask->numel(), " elements, expected at least ", size);
      break;
    }
    case Form::none: break;
  }
  out.data = mask->data_ptr();
  return out;
}

eagle::TreeOut tree_of(const Tensor& parents, const Tensor& depths, const Tensor& retrieve, const Tensor& leaf_count, const Tensor& width,
                       const Tensor& first_child, const Tensor& next_sibling, const Tensor& orphans, bool sorted) {
  TORCH_CHECK(parents.dim() == 2 && retrieve.dim() == 3 && parents.size(1) > 0, "parents must be [batch, nodes] and retrieve_indices 3-D");
  const int64_t batch = parents.size(0), nodes = parents.size(1), columns = retrieve.size(2);
  return {batch,
          nodes,
          columns,
          longs(parents, "parents", {batch, nodes}),
          longs(depths, "depths", {batch, nodes}),
          longs(retrieve, "retrieve_indices", {batch, nodes, columns}),
          longs(leaf_count, "leaf_count", {batch}),
          longs(width, "width", {batch}),
          longs(first_child, "first_child", {batch, nodes}),
          longs(next_sibling, "next_sibling", {batch, nodes}),
          longs(orphans, "orphans", {batch}),
          sorted};
}

bool select(const Tensor& scores, const Tensor& selected) {
  TORCH_CHECK(scores.dim() == 2 && selected.dim() == 2 && selected.size(1) >= 1 && selected.size(1) <= scores.size(1),
              "selected must be [batch, 1 to ", scores.size(1), "]");
  checked(scores, "scores", scores.sizes());
  int64_t* out = longs(selected, "selected", {scores.size(0), selected.size(1)});
  const Dtype dtype = dtype_of(scores);
  return unlocked([&] { return eagle::select(dtype, scores.data_ptr(), scores.size(0), scores.size(1), selected.size(1), out); });
}

bool build(const Maybe& scores, const Tensor& selected, const Tensor& tokens, const Tensor& parents, const Tensor& root_tokens,
           const Tensor& draft_tokens, const Tensor& node_parents, const Tensor& depths, const Maybe& mask, const Tensor& retrieve,
           const Tensor& leaf_count, const Tensor& width, const Tensor& first_child, const Tensor& next_sibling, const Tensor& orphans,
           const Maybe& prefix, int64_t form, bool sorted) {
  const auto out = tree_of(node_parents, depths, retrieve, leaf_count, width, first_child, next_sibling, orphans, sorted);
  TORCH_CHECK(tokens.dim() == 2 && parents.dim() == 2 && parents.size(1) > 0 && tokens.size(1) % parents.size(1) == 0,
              "tokens must be [batch, candidates] and parents [batch, rows]");
  const int64_t candidates = tokens.size(1), rows = parents.size(1);
  const int64_t *chosen = longs(selected, "selected", {out.batch, out.nodes - 1}), *all = longs(tokens, "tokens", {out.batch, candidates});
  const int64_t *above = longs(parents, "parents", {out.batch, rows}), *roots = longs(root_tokens, "root_tokens", {out.batch});
  int64_t* draft = longs(draft_tokens, "draft_tokens", {out.batch, out.nodes});
  const auto picture = mask_of(mask, form, prefix, out.batch, out.nodes);
  bool malformed = false;
  if (scores) {
    TORCH_CHECK(scores->sizes() == tokens.sizes(), "scores must be like tokens");
    malformed = select(*scores, selected);
  }
  return unlocked([&] {
    malformed |= eagle::resolve(chosen, all, above, roots, candidates, rows, draft, out);
    malformed |= eagle::fill_tree(out);
    eagle::fill_mask(out.parents, out.batch, out.nodes, picture);
    return malformed;
  });
}

bool assemble(const Tensor& parents_in, const Tensor& node_parents, const Tensor& depths, const Maybe& mask, const Tensor& retrieve,
              const Tensor& leaf_count, const Tensor& width, const Tensor& first_child, const Tensor& next_sibling, const Tensor& orphans,
              const Maybe& prefix, int64_t form, bool sorted) {
  const auto out = tree_of(node_parents, depths, retrieve, leaf_count, width, first_child, next_sibling, orphans, sorted);
  const int64_t* given = longs(parents_in, "parents", {out.batch, out.nodes});
  const auto picture = mask_of(mask, form, prefix, out.batch, out.nodes);
  return unlocked([&] {
    bool malformed = eagle::copy_parents(given, out.batch, out.nodes, false, out.parents);
    malformed |= eagle::fill_tree(out);
    eagle::fill_mask(out.parents, out.batch, out.nodes, picture);
    return malformed;
  });
}

bool tree_mask(const Tensor& parents, const Tensor& mask, int64_t form, const Maybe& prefix) {
  TORCH_CHECK(parents.dim() == 2, "parents must be [batch, nodes]");
  const int64_t batch = parents.size(0), nodes = parents.size(1);
  const int64_t* given = longs(parents, "parents", {batch, nodes});
  const auto picture = mask_of(mask, form, prefix, batch, nodes);
  return unlocked([&] {
    std::vector<int64_t> valid(batch * nodes);
    const bool malformed = eagle::copy_parents(given, batch, nodes, true, valid.data());
    eagle::fill_mask(valid.data(), batch, nodes, picture);
    return malformed;
  });
}

eagle::WalkIn walk_of(const Tensor& draft_tokens, const Tensor& first_child, const Tensor& next_sibling, const Maybe& retrieve) {
  TORCH_CHECK(draft_tokens.dim() == 2 && draft_tokens.size(1) > 0, "draft_tokens must be [batch, nodes]");
  TORCH_CHECK(!retrieve || retrieve->dim() == 3, "retrieve_indices must be [batch, rows, columns]");
  const int64_t batch = draft_tokens.size(0), nodes = draft_tokens.size(1);
  const int64_t rows = retrieve ? retrieve->size(1) : 0, columns = retrieve ? retrieve->size(2) : 0;
  return {batch,
          nodes,
          longs(draft_tokens, "draft_tokens", {batch, nodes}),
          longs(first_child, "first_child", {batch, nodes}),
          longs(next_sibling, "next_sibling", {batch, nodes}),
          longs(retrieve, "retrieve_indices", {batch, rows, columns}),
          rows,
          columns};
}

eagle::WalkOut results_of(const eagle::WalkIn& in, const Tensor& accept_index, const Tensor& accept_length, const Tensor& predicts,
                          const Tensor& next_token, const Maybe& best_candidate, const Maybe& sample_p, const Tensor* rows) {
  TORCH_CHECK(accept_index.dim() == 2 && accept_index.size(1) > 0, "accept_index must be [batch, width]");
  TORCH_CHECK(!best_candidate || in.retrieve, "best_candidate needs retrieve_indices");
  TORCH_CHECK(!sample_p || (rows && sample_p->scalar_type() == rows->scalar_type()), "sample_p must be of the dtype of its rows");
  const int64_t columns = accept_index.size(1);
  return {longs(accept_index, "accept_index", {in.batch, columns}),
          longs(accept_length, "accept_length", {in.batch}),
          longs(predicts, "predicts", {in.batch, in.nodes}),
          longs(next_token, "next_token", {in.batch}),
          longs(best_candidate, "best_candidate", {in.batch}),
          columns,
          sample_p ? checked(*sample_p, "sample_p", {in.batch, rows->size(2)}).data_ptr() : nullptr};
}

bool verify_greedy(const Tensor& draft_tokens, const Tensor& first_child, const Tensor& next_sibling, const Maybe& retrieve,
                   const Maybe& logits, const Maybe& target_tokens, const Tensor& accept_index, const Tensor& accept_length,
                   const Tensor& predicts, const Tensor& next_token, const Maybe& best_candidate, const Maybe& sample_p) {
  const auto in = walk_of(draft_tokens, first_child, next_sibling, retrieve);
  TORCH_CHECK(bool(logits) != bool(target_tokens), "expected logits or target_tokens");
  const int64_t vocab = logits ? logits->size(-1) : 0;
  if (logits) checked(*logits, "logits", {in.batch, in.nodes, vocab});
  const int64_t* targets = longs(target_tokens, "target_tokens", {in.batch, in.nodes});
  const auto out =
      results_of(in, accept_index, accept_length, predicts, next_token, best_candidate, sample_p, logits ? &*logits : nullptr);
  const Dtype dtype = logits ? dtype_of(*logits) : Dtype::f32;
  const void* data = logits ? logits->data_ptr() : nullptr;
  return unlocked([&] { return eagle::verify_greedy(in, dtype, data, targets, vocab, out); });
}

bool verify_sampling(const Tensor& draft_tokens, const Tensor& first_child, const Tensor& next_sibling, const Maybe& retrieve,
                     const Tensor& probs, const Maybe& coins, const Maybe& final_coins, const Maybe& seed, const Maybe& offset,
                     int64_t rule, double threshold_single, double threshold_acc, const Tensor& accept_index, const Tensor& accept_length,
                     const Tensor& predicts, const Tensor& next_token, const Maybe& best_candidate, const Maybe& sample_p) {
  const auto in = walk_of(draft_tokens, first_child, next_sibling, retrieve);
  const int64_t vocab = probs.size(-1);
  checked(probs, "target_probs", {in.batch, in.nodes, vocab});
  TORCH_CHECK(bool(coins) == bool(final_coins) && bool(coins) != bool(seed) && bool(seed) == bool(offset), "expected coins or a seed");
  const auto doubles = [](const Maybe& x, const char* name, at::IntArrayRef shape) -> const double* {
    if (!x) return nullptr;
    TORCH_CHECK(x->scalar_type() == at::kDouble, name, " must be float64");
    return checked(*x, name, shape).data_ptr<double>();
  };
  const eagle::Coins numbers{doubles(coins, "coins", {in.batch, in.nodes}),
                             doubles(final_coins, "final_coins", {in.batch}),
                             seed ? *longs(seed, "seed", {1}) : 0,
                             offset ? *longs(offset, "offset", {1}) : 0,
                             rule == 1,
                             threshold_single,
                             threshold_acc};
  const auto out = results_of(in, accept_index, accept_length, predicts, next_token, best_candidate, sample_p, &probs);
  const Dtype dtype = dtype_of(probs);
  return unlocked([&] { return eagle::verify_sampling(in, dtype, probs.data_ptr(), vocab, numbers, out); });
}

eagle::Rows5 rows_of(const Tensor& x, const char* name) {
  TORCH_CHECK(x.device().is_cpu() && (x.dim() == 4 || x.dim() == 5) && (x.stride(-1) == 1 || x.size(-1) == 1), name,
              " must be a CPU tensor [(layers,) batch, heads, rows, head_dim] with a contiguous last dimension");
  const int64_t at = x.dim() - 4;
  return {static_cast<char*>(x.data_ptr()), at ? x.size(0) : 1, x.size(at), x.size(at + 1), x.size(at + 2), at ? x.stride(0) : 0,
          x.stride(at), x.stride(at + 1), x.stride(at + 2)};
}

bool append(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k_new, const Tensor& v_new, const Tensor& lengths,
            const Tensor& lengths_out, bool strict) {
  const Tensor* pairs[2][2] = {{&k_cache, &k_new}, {&v_cache, &v_new}};
  const int64_t batch = k_cache.size(0), element = k_cache.element_size();
  for (const auto& [cache, fresh] : pairs)
    TORCH_CHECK(cache->dim() == 4 && fresh->dim() == 4 && cache->sizes() == k_cache.sizes() && fresh->sizes() == k_new.sizes() &&
                    fresh->size(0) == batch && fresh->size(1) == cache->size(1) && fresh->size(3) == cache->size(3) &&
                    cache->scalar_type() == k_cache.scalar_type() && fresh->scalar_type() == k_cache.scalar_type(),
                "caches and new rows must agree in shape and dtype");
  const int64_t *held = longs(lengths, "lengths", {batch}), row_bytes = k_cache.size(3) * element;
  int64_t* ends = longs(lengths_out, "lengths_out", {batch});
  const eagle::Rows5 rows[2][2] = {{rows_of(k_cache, "k_cache"), rows_of(k_new, "k_new")},
                                   {rows_of(v_cache, "v_cache"), rows_of(v_new, "v_new")}};
  return unlocked([&] {
    const bool malformed = eagle::append_lengths(held, batch, k_new.size(2), k_cache.size(2), ends);
    for (const auto& [cache, fresh] : rows) eagle::append(cache, fresh, row_bytes, element, held, strict);
    return malformed && strict;
  });
}

bool retrieve(const Tensor& k_cache, const Tensor& v_cache, const Tensor& indices, const Tensor& k, const Tensor& v) {
  TORCH_CHECK(k_cache.dim() == 4 && v_cache.sizes() == k_cache.sizes() && indices.dim() == 2,
              "caches must be [batch, heads, rows, head_dim]");
  const int64_t batch = k_cache.size(0), count = indices.size(1), element = k_cache.element_size();
  const int64_t* wanted = longs(indices, "indices", {batch, count});
  TORCH_CHECK(k.scalar_type() == k_cache.scalar_type() && v.scalar_type() == k_cache.scalar_type() &&
                  v_cache.scalar_type() == k_cache.scalar_type(),
              "k, v and the caches must have one dtype");
  const at::DimVector shape{batch, k_cache.size(1), count, k_cache.size(3)};
  char* out[2] = {static_cast<char*>(checked(k, "k", shape).data_ptr()), static_cast<char*>(checked(v, "v", shape).data_ptr())};
  const eagle::Rows5 rows[2] = {rows_of(k_cache, "k_cache"), rows_of(v_cache, "v_cache")};
  return unlocked([&] {
    bool malformed = false;
    for (int x = 0; x < 2; ++x) malformed |= eagle::retrieve(rows[x], wanted, count, k_cache.size(3) * element, element, out[x]);
    return malformed;
  });
}

bool commit(const std::vector<Tensor>& layers, const Tensor& lengths, const Tensor& accept_index, const Tensor& accept_length,
            const Maybe& block_table, const Maybe& hidden, const Tensor& lengths_out, const Maybe& hidden_out, bool strict) {
  TORCH_CHECK(!layers.empty() && accept_index.dim() == 2, "expected caches and accept_index [batch, width]");
  const Tensor& head = layers[0];
  const int64_t batch = accept_index.size(0), width = accept_index.size(1), element = head.element_size();
  std::vector<eagle::Rows5> rows;
  for (const Tensor& x : layers) {
    TORCH_CHECK(x.dim() == 5 && x.scalar_type() == head.scalar_type() && x.size(1) == head.size(1) && x.size(3) == head.size(3) &&
                    x.size(4) == head.size(4),
                "caches must agree in batch, rows, head_dim and dtype");
    rows.push_back(rows_of(x, "caches"));
  }
  TORCH_CHECK(block_table || head.size(1) == batch, "caches have batch ", head.size(1), ", expected ", batch);
  TORCH_CHECK(bool(hidden) == bool(hidden_out), "hidden needs a place");
  const int64_t blocks = block_table ? block_table->size(-1) : 0, nodes = hidden ? hidden->size(1) : -1;
  const eagle::CommitIn in{batch,
                           width,
                           head.size(3),
                           head.size(1),
                           head.size(3),
                           longs(lengths, "lengths", {batch}),
                           longs(accept_index, "accept_index", {batch, width}),
                           longs(accept_length, "accept_length", {batch}),
                           longs(block_table, "block_table", {batch, blocks}),
                           blocks,
                           nodes};
  int64_t* ends = longs(lengths_out, "lengths_out", {batch});
  char *from = nullptr, *to = nullptr;
  int64_t hidden_bytes = 0;
  if (hidden) {
    from = static_cast<char*>(checked(*hidden, "hidden", {batch, nodes, hidden->size(2)}).data_ptr());
    TORCH_CHECK(hidden_out->scalar_type() == hidden->scalar_type(), "hidden_out must be of the dtype of hidden");
    to = static_cast<char*>(checked(*hidden_out, "hidden_out", {batch, width, hidden->size(2)}).data_ptr());
    hidden_bytes = hidden->size(2) * hidden->element_size();
  }
  return unlocked([&] {
    std::vector<uint8_t> valid(batch);
    if (eagle::commit_valid(in, rows[0], valid.data()) && strict) return true;
    eagle::commit_rows(in, rows, head.size(4) * element, element, valid.data());
    eagle::commit_hidden(in, from, hidden_bytes, to, ends, valid.data());
    return false;
  });
}

bool logsoftmax_topk(const Tensor& logits, const Tensor& values, const Tensor& tokens, const Maybe& d2t) {
  const int64_t vocab = logits.size(-1), k = values.size(-1), rows = logits.numel() / vocab;
  checked(logits, "logits", logits.sizes());
  TORCH_CHECK(k >= 1 && k <= vocab && values.numel() == rows * k && values.scalar_type() == logits.scalar_type(),
              "values must be [..., k]");
  checked(values, "values", values.sizes());
  int64_t* out = longs(tokens, "tokens", values.sizes());
  const int64_t* offsets = longs(d2t, "d2t", {vocab});
  const Dtype dtype = dtype_of(logits);
  return unlocked([&] { return eagle::logsoftmax_topk(dtype, logits.data_ptr(), rows, vocab, k, offsets, values.data_ptr(), out); });
}

bool cumulative_topk(const Tensor& log_probs, const Tensor& scores, const Maybe& tokens, int64_t first_parent, const Tensor& cumulative,
                     const Tensor& best, const Tensor& index, const Tensor& rows, const Maybe& chosen, const Maybe& parents) {
  TORCH_CHECK(log_probs.dim() == 3 && index.dim() == 2, "log_probs must be [batch, rows, width]");
  const int64_t batch = log_probs.size(0), count = log_probs.size(1), width = log_probs.size(2), k = index.size(1);
  TORCH_CHECK(k >= 1 && k <= count * width && bool(tokens) == bool(chosen), "k is ", k);
  const Dtype dtype = dtype_of(log_probs);
  for (const Tensor* x : {&scores, &cumulative, &best})
    TORCH_CHECK(x->scalar_type() == log_probs.scalar_type(), "scores must be of the dtype of log_probs");
  const at::DimVector all{batch, count, width}, some{batch, k};
  checked(log_probs, "log_probs", all);
  checked(scores, "scores", {batch, count});
  const int64_t* given = longs(tokens, "tokens", all);
  const eagle::FrontierOut out{checked(cumulative, "cumulative", all).data_ptr(), checked(best, "best", some).data_ptr(),
                               longs(index, "index", some), longs(rows, "rows", some), longs(chosen, "chosen", some),
                               longs(parents, "parents", some)};
  return unlocked([&] {
    return eagle::cumulative_topk(dtype, log_probs.data_ptr(), scores.data_ptr(), given, batch, count, width, k, first_parent, out);
  });
}

}  // namespace

void bind_eagle(py::module_& m) {
  m.def("eagle_select", &select);
  m.def("eagle_build", &build);
  m.def("eagle_assemble", &assemble);
  m.def("eagle_tree_mask", &tree_mask);
  m.def("eagle_verify_greedy", &verify_greedy);
  m.def("eagle_verify_sampling", &verify_sampling);
  m.def("eagle_append", &append);
  m.def("eagle_retrieve", &retrieve);
  m.def("eagle_commit", &commit);
  m.def("eagle_logsoftmax_topk", &logsoftmax_topk);
  m.def("eagle_cumulative_topk", &cumulative_topk);
}

}  // namespace sparse_attention::bindings
