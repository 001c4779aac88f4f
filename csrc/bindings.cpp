// Between Python and the engines: checks, allocation, and the params. Only the files named *bindings.cpp include torch.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/engines.h"

namespace sparse_attention::bindings {

using at::Tensor;

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kDouble: return Dtype::f64;
    case at::kBFloat16: return Dtype::bf16;
    case at::kHalf: return Dtype::f16;
    default: TORCH_CHECK(false, "q has dtype ", x.scalar_type(), ", expected float32, float64, bfloat16 or float16");
  }
}

at::ScalarType accumulator_of(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

Tensor4 view(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

template <class T>
const T* table(const Tensor& x, at::ScalarType type, const char* name) {
  TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == type && x.is_contiguous(), name, " must be a contiguous ", type,
              " CPU tensor, got ", x.scalar_type(), " on ", x.device());
  return static_cast<const T*>(x.data_ptr());
}

// A layout's tables, checked once; the engines read them in every call.
struct Layout {
  Layout(int64_t heads, int64_t q_len, int64_t kv_len, const std::vector<std::vector<Tensor>>& parts)
      : heads(heads), q_len(q_len), kv_len(kv_len), tensors(parts) {
    TORCH_CHECK(!parts.empty(), "a layout needs at least one part");
    for (const auto& part : tensors) {
      TORCH_CHECK(part.size() == 7, "a part is (views, variant_views, head_variant, row_start, runs, masks, masks_t), got ",
                  part.size(), " tensors");
      TORCH_CHECK(part[2].numel() == heads, "head_variant has ", part[2].numel(), " entries, expected ", heads);
      params.push_back({table<View>(part[0], at::kInt, "views"), table<int32_t>(part[1], at::kInt, "variant_views"),
                        table<int32_t>(part[2], at::kInt, "head_variant"), table<int32_t>(part[3], at::kInt, "row_start"),
                        table<Run>(part[4], at::kInt, "runs"), table<uint64_t>(part[5], at::kLong, "masks"),
                        table<uint64_t>(part[6], at::kLong, "masks_t")});
    }
  }
  int64_t heads, q_len, kv_len;
  std::vector<std::vector<Tensor>> tensors;
  std::vector<LayoutParams> params;
};

// A row table, checked once: `rows` lists of columns below `cols` for each variant of a head.
struct Rows {
  Rows(const Tensor& row_start, const Tensor& columns, const Tensor& head_variant, int64_t rows, int64_t cols)
      : rows(rows), cols(cols), tensors{row_start, columns, head_variant} {
    params = {table<int64_t>(row_start, at::kLong, "row_start"), table<int32_t>(columns, at::kInt, "columns"),
              table<int32_t>(head_variant, at::kInt, "head_variant")};
    const int64_t entries = row_start.numel() - 1;
    TORCH_CHECK(rows > 0 && entries % rows == 0, "row_start has ", entries, " rows, expected a multiple of ", rows);
    TORCH_CHECK(params.row_start[0] == 0 && params.row_start[entries] == columns.numel(), "row_start must go from 0 to ",
                columns.numel());
    for (int64_t r = 0; r < entries; ++r)
      TORCH_CHECK(params.row_start[r] <= params.row_start[r + 1], "row_start falls at row ", r);
    for (int64_t e = 0; e < columns.numel(); ++e)
      TORCH_CHECK(uint32_t(params.columns[e]) < uint64_t(cols), "column ", params.columns[e], " is not below ", cols);
    for (int64_t h = 0; h < head_variant.numel(); ++h)
      TORCH_CHECK(uint32_t(params.head_variant[h]) < uint64_t(entries / rows), "head ", h, " has no rows");
  }
  int64_t heads() const { return tensors[2].numel(); }
  int64_t rows, cols;
  std::vector<Tensor> tensors;
  RowsParams params;
};

void check(const Tensor& q, const Tensor& k, const Tensor& v) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must be [batch, heads, seq, head_dim]");
  for (const Tensor* x : {&q, &k, &v}) {
    TORCH_CHECK(x->device().is_cpu() && x->scalar_type() == q.scalar_type(), "q, k and v must be CPU tensors of one dtype");
    TORCH_CHECK(x->size(0) == q.size(0) && x->size(3) == q.size(3), "q, k and v must agree in batch and head_dim");
    TORCH_CHECK(x->stride(3) == 1, "the last dimension must be contiguous");
    TORCH_CHECK(!x->is_neg(), "q, k and v must not be lazily negated: call .resolve_neg()");
  }
  TORCH_CHECK(k.sizes() == v.sizes(), "k and v must have one shape");
  TORCH_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0, "q's heads must be a multiple of k's");
  TORCH_CHECK(q.size(3) % 8 == 0 && q.size(3) >= 8 && q.size(3) <= 256, "head_dim must be a multiple of 8 up to 256");
}

void check_table(const Tensor& q, const Tensor& k, int64_t heads, int64_t q_len, int64_t kv_len) {
  TORCH_CHECK(heads == q.size(1) && q_len == q.size(2) && kv_len == k.size(2), "the plan is for ", heads, " heads and ", q_len,
              " x ", kv_len, " positions, got ", q.size(1), " heads and ", q.size(2), " x ", k.size(2));
}

struct Result {
  Tensor out, lse;
  ForwardParams params;
};

Result prepare_forward(const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool out_accumulator) {
  const auto accumulator = q.options().dtype(accumulator_of(q));
  const auto options = out_accumulator ? accumulator : q.options();
  Tensor out = at::empty_like(q, options);
  if (out.stride(3) != 1) out = at::empty(q.sizes(), options);  // q's rows overlap
  Tensor lse = at::empty({q.size(0), q.size(1), q.size(2)}, accumulator);
  const ForwardParams params{view(q), view(k), view(v), view(out), lse.data_ptr(), int32_t(q.size(0)), int32_t(q.size(1)),
                             int32_t(k.size(1)), int32_t(q.size(2)), int32_t(k.size(2)), int32_t(q.size(3)), scale,
                             false, out_accumulator};
  return {std::move(out), std::move(lse), params};
}

std::tuple<Tensor, Tensor> tile_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Layout& layout, double scale) {
  check(q, k, v);
  check_table(q, k, layout.heads, layout.q_len, layout.kv_len);
  const Dtype dtype = dtype_of(q);
  const bool wide = layout.params.size() > 1 && q.scalar_type() != accumulator_of(q);
  auto [out, lse, params] = prepare_forward(q, k, v, scale, wide);
  {
    py::gil_scoped_release release;
    at::get_num_threads();  // gives a new Python thread torch's setting
    for (const LayoutParams& part : layout.params) {
      sparse_attention::tile_forward(dtype, params, part);
      params.accumulate = true;
    }
    if (wide) out = out.to(q.scalar_type());
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor> gather_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Rows& rows, double scale) {
  check(q, k, v);
  check_table(q, k, rows.heads(), rows.rows, rows.cols);
  const Dtype dtype = dtype_of(q);
  auto [out, lse, params] = prepare_forward(q, k, v, scale, false);
  {
    py::gil_scoped_release release;
    at::get_num_threads();
    sparse_attention::gather_forward(dtype, params, rows.params);
  }
  return {out, lse};
}

Tensor with_contiguous_rows(const Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); }

// Allocates the gradients and delta, calls run(dtype, params), and returns the gradients in the dtype of q.
template <class Run>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q,
                                            const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                                            double scale, Run run) {
  check(q, k, v);
  const auto accumulator = q.options().dtype(accumulator_of(q));
  TORCH_CHECK(out.sizes() == q.sizes() && out.scalar_type() == q.scalar_type() && out.stride(3) == 1,
              "out must have q's shape and dtype");
  TORCH_CHECK(dout.sizes() == q.sizes() && dout.scalar_type() == q.scalar_type(), "dout must have q's shape and dtype");
  TORCH_CHECK(lse.sizes() == q.sizes().slice(0, 3) && lse.scalar_type() == accumulator.dtype().toScalarType(),
              "lse must be [batch, heads, q_len] in the accumulator's dtype");
  py::gil_scoped_release release;
  at::get_num_threads();
  const Tensor dout_rows = with_contiguous_rows(dout), lse_rows = lse.contiguous();
  Tensor dlse_rows;
  if (dlse) {
    TORCH_CHECK(dlse->sizes() == lse.sizes() && dlse->scalar_type() == lse.scalar_type(), "dlse must be like lse");
    dlse_rows = dlse->contiguous();
  }
  const Tensor delta = at::empty(lse.sizes(), accumulator);
  Tensor dq = at::zeros(q.sizes(), accumulator), dk = at::zeros(k.sizes(), accumulator),
         dv = at::zeros(v.sizes(), accumulator);
  const BackwardParams params{view(q), view(k), view(v), view(dout_rows), view(dq), view(dk), view(dv), lse_rows.data_ptr(),
                              delta.data_ptr(), int32_t(q.size(0)), int32_t(q.size(1)), int32_t(k.size(1)),
                              int32_t(q.size(2)), int32_t(k.size(2)), int32_t(q.size(3)), scale};
  const Dtype dtype = dtype_of(q);
  row_delta(dtype, params, view(out), dlse ? dlse_rows.data_ptr() : nullptr, delta.data_ptr());
  run(dtype, params);
  return {dq.to(q.scalar_type()), dk.to(q.scalar_type()), dv.to(q.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor> tile_backward(const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q,
                                                 const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                                                 const Layout& by_query, const Layout& by_key, double scale) {
  check_table(q, k, by_query.heads, by_query.q_len, by_query.kv_len);
  TORCH_CHECK(by_key.params.size() == by_query.params.size() && by_key.heads == by_query.heads &&
                  by_key.q_len == by_query.q_len && by_key.kv_len == by_query.kv_len,
              "by_key must be the transposed by_query");
  return backward(dout, dlse, q, k, v, out, lse, scale, [&](Dtype dtype, const BackwardParams& params) {
    for (size_t part = 0; part < by_query.params.size(); ++part)
      sparse_attention::tile_backward(dtype, params, by_query.params[part], by_key.params[part]);
  });
}

std::tuple<Tensor, Tensor, Tensor> gather_backward(const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q,
                                                   const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                                                   const Rows& by_query, const Rows& by_key, double scale) {
  check_table(q, k, by_query.heads(), by_query.rows, by_query.cols);
  check_table(q, k, by_key.heads(), by_key.cols, by_key.rows);
  return backward(dout, dlse, q, k, v, out, lse, scale, [&](Dtype dtype, const BackwardParams& params) {
    sparse_attention::gather_backward(dtype, params, by_query.params, by_key.params);
  });
}

}  // namespace sparse_attention::bindings

namespace sparse_attention::bindings {
void bind_eagle(py::module_&);   // eagle_bindings.cpp
void bind_decode(py::module_&);  // decode_bindings.cpp
}

PYBIND11_MODULE(_kernels, m) {
  namespace sa = sparse_attention::bindings;
  // module_local: libraries of two revisions can be loaded side by side.
  py::class_<sa::Layout>(m, "Layout", py::module_local())
      .def(py::init<int64_t, int64_t, int64_t, const std::vector<std::vector<at::Tensor>>&>());
  py::class_<sa::Rows>(m, "Rows", py::module_local())
      .def(py::init<const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, int64_t>());
  m.def("tile_forward", &sa::tile_forward);
  m.def("tile_backward", &sa::tile_backward);
  m.def("gather_forward", &sa::gather_forward);
  m.def("gather_backward", &sa::gather_backward);
  sa::bind_eagle(m);
  sa::bind_decode(m);
}
