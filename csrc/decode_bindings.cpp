// The decode engine between Python and csrc/cpu: sizes and values are checked again, so that no call can read outside a cache.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <tuple>

#include "cpu/decode.h"

namespace sparse_attention::bindings {

using at::Tensor;
using Maybe = std::optional<Tensor>;
Dtype dtype_of(const Tensor& x);
at::ScalarType accumulator_of(const Tensor& x);
Tensor4 view(const Tensor& x);

namespace {

void check_decode(const Tensor& q, const Tensor& k, const Tensor& v, bool paged) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q and the caches must have 4 dimensions");
  for (const Tensor* x : {&q, &k, &v}) {
    TORCH_CHECK(x->device().is_cpu() && x->scalar_type() == q.scalar_type(), "q and the caches must be CPU tensors of one dtype");
    TORCH_CHECK(x->size(3) == q.size(3) && x->stride(3) == 1, "q and the caches must agree in head_dim and have it contiguous");
    TORCH_CHECK(!x->is_neg(), "q and the caches must not be lazily negated: call .resolve_neg()");
  }
  TORCH_CHECK(k.sizes() == v.sizes(), "the caches must have one shape");
  TORCH_CHECK(paged || k.size(0) == q.size(0), "the caches must have the batch of q");
  TORCH_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0, "q's heads must be a multiple of the caches'");
  TORCH_CHECK(q.size(2) > 0 && q.size(3) % 8 == 0 && q.size(3) >= 8 && q.size(3) <= 256, "head_dim must be a multiple of 8 up to 256");
}

const Tensor& plain(const Tensor& x, at::ScalarType type, int64_t dims, const char* name) {
  TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == type && x.is_contiguous() && x.dim() == dims, name, " must be a contiguous ", type,
              " CPU tensor of ", dims, " dimensions, got ", x.scalar_type(), " of shape ", x.sizes());
  return x;
}

// The rows that a request may have; checks lengths and the pages in use.
void check_rows(const Tensor& k, const Tensor& lengths, const Maybe& block_table) {
  const int64_t page = k.size(2), most = block_table ? block_table->size(1) : 1;
  for (int64_t b = 0; b < lengths.numel(); ++b) {
    const int64_t length = lengths.const_data_ptr<int64_t>()[b];
    TORCH_CHECK_VALUE(length >= 0 && length <= page * most, "lengths[", b, "] is ", length, "; expected 0 to ", page * most,
                      ", the rows that its cache has");
    for (int64_t x = 0; block_table && x * page < length; ++x) {
      const int32_t found = block_table->const_data_ptr<int32_t>()[b * most + x];
      TORCH_CHECK_VALUE(found >= 0 && found < k.size(0), "block_table[", b, ", ", x, "] is ", found, "; expected a page from 0 to ",
                        k.size(0) - 1);
    }
  }
}

int shift_of(int64_t page) {
  TORCH_CHECK(page > 0 && (page & (page - 1)) == 0, "a page has ", page, " rows, expected a power of two");
  return __builtin_ctzll(page);
}

std::tuple<Tensor, Tensor> decode_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lengths, const Maybe& ancestors,
                                          int64_t window, int64_t sinks, const Maybe& block_table, double scale) {
  const int64_t batch = q.size(0), q_len = q.size(2), words = (q_len + 63) / 64;
  check_decode(q, k, v, block_table.has_value());
  TORCH_CHECK(plain(lengths, at::kLong, 1, "lengths").numel() == batch, "lengths must have the batch of q");
  TORCH_CHECK(window >= -1 && window != 0 && sinks >= 0, "window is ", window, " and sinks ", sinks);
  if (block_table) TORCH_CHECK(plain(*block_table, at::kInt, 2, "block_table").size(0) == batch, "block_table must have the batch of q");
  if (ancestors) {
    const auto sizes = plain(*ancestors, at::kLong, 3, "ancestors").sizes();
    TORCH_CHECK((sizes[0] == batch || sizes[0] == 1) && sizes[1] == q_len && sizes[2] == words, "ancestors has shape ", sizes);
  }
  check_rows(k, lengths, block_table);
  Tensor out = at::empty_like(q);
  if (out.stride(3) != 1) out = at::empty(q.sizes(), q.options());  // q's rows overlap
  Tensor lse = at::empty({batch, q.size(1), q_len}, q.options().dtype(accumulator_of(q)));
  DecodeParams p{view(q), view(k), view(v), view(out), lse.data_ptr(), lengths.const_data_ptr<int64_t>()};
  p.ancestors = ancestors ? reinterpret_cast<const uint64_t*>(ancestors->const_data_ptr<int64_t>()) : nullptr;
  p.ancestors_batch = ancestors && ancestors->size(0) > 1 ? q_len * words : 0;
  p.block_table = block_table ? block_table->const_data_ptr<int32_t>() : nullptr;
  p.most_pages = block_table ? block_table->size(1) : 0;
  p.page_shift = block_table ? shift_of(k.size(2)) : 0;
  p.batch = int32_t(batch), p.heads = int32_t(q.size(1)), p.kv_heads = int32_t(k.size(1)), p.q_len = int32_t(q_len);
  p.head_dim = int32_t(q.size(3)), p.window = window, p.sinks = sinks, p.scale = scale;
  {
    py::gil_scoped_release release;
    at::get_num_threads();  // gives a new Python thread torch's setting
    sparse_attention::decode_forward(dtype_of(q), p);
  }
  return {out, lse};
}

}  // namespace

void bind_decode(py::module_& m) { m.def("decode_forward", &decode_forward); }

}  // namespace sparse_attention::bindings
