// Decoding as its files of bindings share it.
#pragma once
#include <ATen/ATen.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <tuple>

namespace sparse_attention::bindings {

using at::Tensor;

// (out, lse), lse undefined unless asked for. lengths: int64 [batch], or None: `length` for every request; ancestors: int64 [batch or 1,
// q_len, words] or None; window: -1 for none; block_table: int32 [batch, most pages] or None, with caches [pages, kv_heads, page,
// head_dim]. Whatever lengths and the table hold, nothing outside the cache is read. kernel, splits: below 0, 0: as plan.h has it.
std::tuple<Tensor, Tensor> decode_forward(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& lengths, int64_t length,
                                          const std::optional<Tensor>& ancestors, int64_t window, int64_t sinks,
                                          const std::optional<Tensor>& block_table, double scale, bool with_lse = true, int64_t kernel = -1,
                                          int64_t splits = 0);

bool readable(const Tensor& x);

// `decode` of arguments that need no change, or None: then Python looks at them one by one, and says what is wrong.
pybind11::object decode_plain(pybind11::handle q, pybind11::handle k, pybind11::handle v, pybind11::handle lengths, pybind11::handle ancestors,
                              pybind11::handle window, pybind11::handle sinks, pybind11::handle block_table, pybind11::handle scale, bool with_lse);

}  // namespace sparse_attention::bindings
