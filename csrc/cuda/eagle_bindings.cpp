// Between Python and the kernels of the tree operations: selection, trees and masks.
#include "eagle_bindings.h"

#include <algorithm>

#include "bindings.h"

namespace sparse_attention::bindings {
namespace {

using c10::cuda::CUDAGuard;

// `held`: a copy of the prefix on the device, which must outlive the launch.
eagle::MaskOut mask_of(const Maybe& mask, int64_t form, const Maybe& prefix, int64_t batch, int64_t nodes, const Tensor& like, Tensor& held) {
  using eagle::Form;
  TORCH_CHECK(form >= 0 && form <= int64_t(Form::none), "form is ", form);
  eagle::MaskOut out{};
  out.form = Form(form);
  if (out.form == Form::none) return out;
  TORCH_CHECK(mask, "a mask of this form needs a tensor");
  const auto is = [&](at::ScalarType type, at::IntArrayRef shape) {
    TORCH_CHECK(mask->scalar_type() == type, "mask must be ", type, ", got ", mask->scalar_type());
    checked(*mask, "mask", shape, like);
  };
  switch (out.form) {
    case Form::boolean: is(at::kBool, {batch, nodes, nodes}); break;
    case Form::one_zero: is(at::kFloat, {batch, 1, nodes, nodes}); break;
    case Form::additive:
      is(mask->scalar_type(), {batch, 1, nodes, nodes});
      out.dtype = eagle_dtype(*mask);
      break;
    case Form::bits: is(at::kLong, {batch, nodes, (nodes + 63) / 64}); break;
    case Form::bits32: is(at::kInt, {batch, nodes, (nodes + 31) / 32}); break;
    case Form::full: {
      is(at::kBool, {mask->numel()});
      out.size = mask->numel();
      TORCH_CHECK(prefix && prefix->scalar_type() == at::kLong && prefix->dim() == 1 && prefix->size(0) == batch, "a full mask needs ", batch,
                  " int64 prefix lengths");
      held = prefix->contiguous();
      if (!held.is_cpu() || batch > eagle::Prefixes::kHere) {
        held = held.to(like.device(), at::kLong, true);
        out.prefix.there = held.data_ptr<int64_t>();
      } else {
        std::copy_n(held.data_ptr<int64_t>(), batch, out.prefix.here);
      }
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
  TORCH_CHECK(columns > 0 && columns <= nodes, "retrieve_indices has ", columns, " columns, expected 1 to ", nodes);
  const int most = eagle::most_nodes_of_a_tree();
  TORCH_CHECK(nodes <= most, "the tree has ", nodes, " nodes; the CUDA kernel is for ", most, " at most: pass impl='reference'");
  const auto one = [&](const Tensor& x, const char* name) { return longs(x, name, {batch}, parents); };
  const auto each = [&](const Tensor& x, const char* name) { return longs(x, name, {batch, nodes}, parents); };
  eagle::TreeOut out{as_int(batch, "batch"), int(nodes), int(columns)};
  out.parents = each(parents, "parents"), out.depths = each(depths, "depths");
  out.retrieve = longs(retrieve, "retrieve_indices", {batch, nodes, columns}, parents);
  out.leaf_count = one(leaf_count, "leaf_count"), out.width = one(width, "width"), out.orphans = one(orphans, "orphans");
  out.first_child = each(first_child, "first_child"), out.next_sibling = each(next_sibling, "next_sibling");
  out.sorted = sorted;
  return out;
}

bool select(const Tensor& scores, const Tensor& selected) {
  TORCH_CHECK(scores.dim() == 2 && selected.dim() == 2 && selected.size(1) >= 1 && selected.size(1) <= scores.size(1),
              "selected must be [batch, 1 to ", scores.size(1), "]");
  checked(scores, "scores", scores.sizes(), scores);
  int64_t* out = longs(selected, "selected", {scores.size(0), selected.size(1)}, scores);
  const CUDAGuard guard(scores.device());
  launched(eagle::select(eagle_dtype(scores), scores.data_ptr(), as_int(scores.size(0), "batch"), as_int(scores.size(1), "candidates"),
                         int(selected.size(1)), out, stream()));
  return false;
}

bool build(const Maybe& scores, const Tensor& selected, const Tensor& tokens, const Tensor& parents, const Tensor& root_tokens,
           const Tensor& draft_tokens, const Tensor& node_parents, const Tensor& depths, const Maybe& mask, const Tensor& retrieve,
           const Tensor& leaf_count, const Tensor& width, const Tensor& first_child, const Tensor& next_sibling, const Tensor& orphans,
           const Maybe& prefix, int64_t form, bool sorted) {
  const auto out = tree_of(node_parents, depths, retrieve, leaf_count, width, first_child, next_sibling, orphans, sorted);
  TORCH_CHECK(tokens.dim() == 2 && parents.dim() == 2 && parents.size(1) > 0 && tokens.size(1) > 0 && tokens.size(1) % parents.size(1) == 0,
              "tokens must be [batch, candidates] and parents [batch, rows]");
  const int64_t batch = out.batch, candidates = tokens.size(1), rows = parents.size(1), total = out.nodes - 1;
  TORCH_CHECK(total >= 1 && (!scores || total <= candidates), "selected has ", total, " columns, expected 1 to ", candidates);
  const Tensor& like = node_parents;
  const CUDAGuard guard(like.device());
  eagle::Candidates in{};
  if (scores) {
    in.scores = checked(*scores, "scores", {batch, candidates}, like).data_ptr();
    in.dtype = eagle_dtype(*scores);
  }
  in.selected = longs(selected, "selected", {batch, total}, like);
  in.tokens = longs(tokens, "tokens", {batch, candidates}, like);
  in.parents = longs(parents, "parents", {batch, rows}, like);
  in.root_tokens = longs(root_tokens, "root_tokens", {batch}, like);
  in.count = as_int(candidates, "candidates"), in.rows = int(rows);
  in.draft_tokens = longs(draft_tokens, "draft_tokens", {batch, total + 1}, like);
  Tensor held;
  launched(eagle::build(in, out, mask_of(mask, form, prefix, batch, out.nodes, like, held), stream()));
  return false;
}

bool assemble(const Tensor& parents_in, const Tensor& node_parents, const Tensor& depths, const Maybe& mask, const Tensor& retrieve,
              const Tensor& leaf_count, const Tensor& width, const Tensor& first_child, const Tensor& next_sibling, const Tensor& orphans,
              const Maybe& prefix, int64_t form, bool sorted) {
  const auto out = tree_of(node_parents, depths, retrieve, leaf_count, width, first_child, next_sibling, orphans, sorted);
  const int64_t* given = longs(parents_in, "parents", {out.batch, out.nodes}, node_parents);
  const CUDAGuard guard(node_parents.device());
  Tensor held;
  launched(eagle::assemble(given, out, mask_of(mask, form, prefix, out.batch, out.nodes, node_parents, held), stream()));
  return false;
}

bool tree_mask(const Tensor& parents, const Tensor& mask, int64_t form, const Maybe& prefix) {
  TORCH_CHECK(parents.dim() == 2, "parents must be [batch, nodes]");
  const int64_t batch = parents.size(0), nodes = parents.size(1), most = eagle::most_nodes_of_a_mask();
  TORCH_CHECK(nodes >= 1 && nodes <= most, "the tree has ", nodes, " nodes; the CUDA kernel is for 1 to ", most, ": pass impl='reference'");
  const int64_t* given = longs(parents, "parents", {batch, nodes}, parents);
  const CUDAGuard guard(parents.device());
  Tensor held;
  launched(eagle::tree_mask(given, as_int(batch, "batch"), int(nodes), mask_of(mask, form, prefix, batch, nodes, parents, held), stream()));
  return false;
}

eagle::WalkIn walk_of(const Tensor& draft_tokens, const Tensor& first_child, const Tensor& next_sibling, const Maybe& retrieve) {
  TORCH_CHECK(draft_tokens.dim() == 2 && draft_tokens.size(1) > 0, "draft_tokens must be [batch, nodes]");
  TORCH_CHECK(!retrieve || retrieve->dim() == 3, "retrieve_indices must be [batch, rows, columns]");
  const int64_t batch = draft_tokens.size(0), nodes = draft_tokens.size(1), most = eagle::most_nodes_of_a_walk();
  const int64_t rows = retrieve ? retrieve->size(1) : 0, columns = retrieve ? retrieve->size(2) : 0;
  TORCH_CHECK(nodes <= most, "the tree has ", nodes, " nodes; the CUDA kernel is for ", most, " at most: pass impl='reference'");
  const auto links = [&](const Tensor& x, const char* name) { return longs(x, name, {batch, nodes}, draft_tokens); };
  return {as_int(batch, "batch"),
          int(nodes),
          links(draft_tokens, "draft_tokens"),
          links(first_child, "first_child"),
          links(next_sibling, "next_sibling"),
          longs(retrieve, "retrieve_indices", {batch, rows, columns}, draft_tokens),
          as_int(rows, "rows"),
          as_int(columns, "columns")};
}

eagle::WalkOut results_of(const eagle::WalkIn& in, const Tensor& accept_index, const Tensor& accept_length, const Tensor& predicts,
                          const Tensor& next_token, const Maybe& best_candidate, const Maybe& sample_p, const Tensor* rows,
                          const Tensor& like) {
  TORCH_CHECK(accept_index.dim() == 2 && accept_index.size(1) > 0, "accept_index must be [batch, width]");
  TORCH_CHECK(!best_candidate || in.retrieve, "best_candidate needs retrieve_indices");
  TORCH_CHECK(!sample_p || (rows && sample_p->scalar_type() == rows->scalar_type()), "sample_p must be of the dtype of its rows");
  const int64_t columns = accept_index.size(1);
  return {longs(accept_index, "accept_index", {in.batch, columns}, like),
          longs(accept_length, "accept_length", {in.batch}, like),
          longs(predicts, "predicts", {in.batch, in.nodes}, like),
          longs(next_token, "next_token", {in.batch}, like),
          longs(best_candidate, "best_candidate", {in.batch}, like),
          as_int(columns, "width"),
          sample_p ? checked(*sample_p, "sample_p", {in.batch, rows->size(2)}, like).data_ptr() : nullptr};
}

bool verify_greedy(const Tensor& draft_tokens, const Tensor& first_child, const Tensor& next_sibling, const Maybe& retrieve,
                   const Maybe& logits, const Maybe& target_tokens, const Tensor& accept_index, const Tensor& accept_length,
                   const Tensor& predicts, const Tensor& next_token, const Maybe& best_candidate, const Maybe& sample_p) {
  const auto in = walk_of(draft_tokens, first_child, next_sibling, retrieve);
  TORCH_CHECK(bool(logits) != bool(target_tokens), "expected logits or target_tokens");
  const auto out = results_of(in, accept_index, accept_length, predicts, next_token, best_candidate, sample_p, logits ? &*logits : nullptr,
                              draft_tokens);
  const int64_t* targets = longs(target_tokens, "target_tokens", {in.batch, in.nodes}, draft_tokens);
  const CUDAGuard guard(draft_tokens.device());
  if (targets) {
    launched(eagle::verify_greedy(in, eagle::Dtype::f32, nullptr, targets, 0, out, nullptr, stream()));
    return false;
  }
  TORCH_CHECK(logits->dim() == 3 && logits->size(2) > 0, "logits must be [batch, nodes, vocab]");
  const int64_t vocab = as_int(logits->size(2), "vocab");
  checked(*logits, "logits", {in.batch, in.nodes, vocab}, draft_tokens);
  const auto dtype = eagle_dtype(*logits);
  const Tensor workspace = at::empty({eagle::greedy_workspace(in, dtype, vocab)}, draft_tokens.options().dtype(at::kByte));
  launched(eagle::verify_greedy(in, dtype, logits->data_ptr(), nullptr, vocab, out, workspace.data_ptr(), stream()));
  return false;
}

bool verify_sampling(const Tensor& draft_tokens, const Tensor& first_child, const Tensor& next_sibling, const Maybe& retrieve,
                     const Tensor& probs, const Maybe& coins, const Maybe& final_coins, const Maybe& seed, const Maybe& offset,
                     int64_t rule, double threshold_single, double threshold_acc, const Tensor& accept_index, const Tensor& accept_length,
                     const Tensor& predicts, const Tensor& next_token, const Maybe& best_candidate, const Maybe& sample_p) {
  const auto in = walk_of(draft_tokens, first_child, next_sibling, retrieve);
  const int most = eagle::most_nodes_of_a_sample();
  TORCH_CHECK(in.nodes <= most, "the tree has ", in.nodes, " nodes; the CUDA kernel is for ", most, " at most: pass impl='reference'");
  TORCH_CHECK(probs.dim() == 3 && probs.size(2) > 0, "target_probs must be [batch, nodes, vocab]");
  const int vocab = as_int(probs.size(2), "vocab");
  checked(probs, "target_probs", {in.batch, in.nodes, vocab}, draft_tokens);
  TORCH_CHECK(bool(coins) == bool(final_coins) && bool(coins) != bool(seed) && bool(seed) == bool(offset), "expected coins or a seed");
  const auto doubles = [&](const Maybe& x, const char* name, at::IntArrayRef shape) -> const double* {
    if (!x) return nullptr;
    TORCH_CHECK(x->scalar_type() == at::kDouble, name, " must be float64");
    return checked(*x, name, shape, draft_tokens).data_ptr<double>();
  };
  const eagle::Coins numbers{doubles(coins, "coins", {in.batch, in.nodes}),
                             doubles(final_coins, "final_coins", {in.batch}),
                             longs(seed, "seed", {1}, draft_tokens),
                             longs(offset, "offset", {1}, draft_tokens),
                             rule == 1,
                             threshold_single,
                             threshold_acc};
  const auto out = results_of(in, accept_index, accept_length, predicts, next_token, best_candidate, sample_p, &probs, draft_tokens);
  const CUDAGuard guard(draft_tokens.device());
  launched(eagle::verify_sampling(in, eagle_dtype(probs), probs.data_ptr(), vocab, numbers, out, stream()));
  return false;
}

bool logsoftmax_topk(const Tensor& logits, const Tensor& values, const Tensor& tokens, const Maybe& d2t) {
  TORCH_CHECK(logits.dim() > 0 && logits.numel() > 0 && values.dim() == logits.dim(), "logits must be [..., vocab] and values [..., k]");
  const int64_t vocab = as_int(logits.size(-1), "vocab"), k = values.size(-1), rows = as_int(logits.numel() / vocab, "rows");
  TORCH_CHECK(k >= 1 && k <= vocab && values.numel() == rows * k && values.scalar_type() == logits.scalar_type(), "values must be [..., k]");
  TORCH_CHECK(k <= eagle::kMostBest, "k is ", k, "; the CUDA kernel is for ", eagle::kMostBest, " at most: pass impl='reference'");
  checked(logits, "logits", logits.sizes(), logits);
  checked(values, "values", values.sizes(), logits);
  int64_t* out = longs(tokens, "tokens", values.sizes(), logits);
  const int64_t* offsets = longs(d2t, "d2t", {vocab}, logits);
  const CUDAGuard guard(logits.device());
  launched(eagle::logsoftmax_topk(eagle_dtype(logits), logits.data_ptr(), int(rows), int(vocab), int(k), offsets, values.data_ptr(), out,
                                  stream()));
  return false;
}

bool cumulative_topk(const Tensor& log_probs, const Tensor& scores, const Maybe& tokens, int64_t first_parent, const Tensor& cumulative,
                     const Tensor& best, const Tensor& index, const Tensor& rows, const Maybe& chosen, const Maybe& parents) {
  TORCH_CHECK(log_probs.dim() == 3 && index.dim() == 2, "log_probs must be [batch, rows, width]");
  const int64_t batch = log_probs.size(0), count = log_probs.size(1), width = log_probs.size(2), k = index.size(1);
  TORCH_CHECK(k >= 1 && k <= as_int(count * width, "rows * width") && bool(tokens) == bool(chosen), "k is ", k);
  TORCH_CHECK(k <= eagle::kMostBest, "k is ", k, "; the CUDA kernel is for ", eagle::kMostBest, " at most: pass impl='reference'");
  for (const Tensor* x : {&scores, &cumulative, &best})
    TORCH_CHECK(x->scalar_type() == log_probs.scalar_type(), "scores must be of the dtype of log_probs");
  const at::DimVector all{batch, count, width}, some{batch, k};
  eagle::Frontier f{};
  f.log_probs = checked(log_probs, "log_probs", all, log_probs).data_ptr();
  f.scores = checked(scores, "scores", {batch, count}, log_probs).data_ptr();
  f.tokens = longs(tokens, "tokens", all, log_probs);
  f.batch = as_int(batch, "batch"), f.rows = int(count), f.width = int(width), f.k = int(k), f.first_parent = first_parent;
  f.cumulative = checked(cumulative, "cumulative", all, log_probs).data_ptr();
  f.best = checked(best, "best", some, log_probs).data_ptr();
  f.index = longs(index, "index", some, log_probs), f.index_rows = longs(rows, "rows", some, log_probs);
  f.chosen = longs(chosen, "chosen", some, log_probs), f.parents = longs(parents, "parents", some, log_probs);
  const CUDAGuard guard(log_probs.device());
  launched(eagle::cumulative_topk(eagle_dtype(log_probs), f, stream()));
  return false;
}

}  // namespace

void bind_eagle(pybind11::module_& m) {
  bind_eagle_cache(m);
  m.def("eagle_select", &select);
  m.def("eagle_build", &build);
  m.def("eagle_assemble", &assemble);
  m.def("eagle_tree_mask", &tree_mask);
  m.def("eagle_verify_greedy", &verify_greedy);
  m.def("eagle_verify_sampling", &verify_sampling);
  m.def("eagle_logsoftmax_topk", &logsoftmax_topk);
  m.def("eagle_cumulative_topk", &cumulative_topk);
}

}  // namespace sparse_attention::bindings
