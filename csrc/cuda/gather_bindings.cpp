// Between Python and the gather engine: checks, allocation, and the params.
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include <tuple>

#include "bindings.h"
#include "gather/gather.h"

namespace sparse_attention::bindings {
namespace {

using at::Tensor;

const Tensor& table(const Tensor& x, at::ScalarType type, const char* name) {
  TORCH_CHECK(x.is_cuda() && x.scalar_type() == type && x.is_contiguous(), name, " must be a contiguous ", type, " CUDA tensor, got ",
              x.scalar_type(), " on ", x.device());
  return x;
}

// The tables of one pattern on one device, as sparse_attention/cuda_rows.py makes them. What they hold is not checked.
struct Rows {
  Rows(const Tensor& row_start, const Tensor& columns, const Tensor& head_variant, const Tensor& pieces, const Tensor& splits, int64_t longest,
       int64_t together, bool apart, int64_t q_len, int64_t kv_len)
      : row_start(table(row_start, at::kLong, "row_start")), columns(table(columns, at::kInt, "columns")),
        head_variant(table(head_variant, at::kInt, "head_variant")), pieces(table(pieces, at::kInt, "pieces")),
        splits(table(splits, at::kInt, "splits")), longest(longest), together(together), apart(apart), q_len(q_len), kv_len(kv_len) {
    for (const Tensor* x : {&pieces, &splits})
      TORCH_CHECK(x->dim() == 2 && x->size(1) == 4, "pieces and splits have shapes ", pieces.sizes(), " and ", splits.sizes(), ", expected [n, 4]");
    TORCH_CHECK(q_len > 0 && (row_start.numel() - 1) % q_len == 0, "row_start has ", row_start.numel() - 1, " rows, expected a multiple of ", q_len);
    TORCH_CHECK(together == 1 || together == 2 || together == 4, "together is ", together, ", expected 1, 2 or 4");
  }
  Tensor row_start, columns, head_variant, pieces, splits;
  int64_t longest, together;
  bool apart;
  int64_t q_len, kv_len;
};

void check(const Tensor& q, const Tensor& k, const Tensor& v, const Rows& rows) {
  const int64_t heads = rows.head_variant.numel();
  TORCH_CHECK(q.is_cuda() && q.device() == rows.columns.device(), "q is on ", q.device(), ", its rows on ", rows.columns.device());
  for (const Tensor* x : {&q, &k, &v}) {
    TORCH_CHECK(x->scalar_type() == q.scalar_type() && x->device() == q.device(), "k and v must have the dtype and device of q");
    TORCH_CHECK(!x->is_neg(), "q, k and v must not be lazily negated: call .resolve_neg()");
    TORCH_CHECK(x->dim() == 4 && x->stride(3) == 1, "q, k and v must be [batch, heads, seq, head_dim], the last dimension contiguous");
  }
  TORCH_CHECK(q.size(1) == heads && q.size(2) == rows.q_len, "q has shape ", q.sizes(), ", the rows are for ", heads, " heads and ", rows.q_len,
              " queries");
  TORCH_CHECK(k.size(0) == q.size(0) && k.size(2) == rows.kv_len && k.size(3) == q.size(3) && v.sizes() == k.sizes(), "k and v have shapes ",
              k.sizes(), " and ", v.sizes(), ", the rows are for ", rows.kv_len, " keys");
  TORCH_CHECK(k.size(1) > 0 && heads % (k.size(1) * rows.together) == 0, "q has ", heads, " heads and k ", k.size(1), ", the rows take ",
              rows.together, " together");
  TORCH_CHECK(q.size(3) % 8 == 0 && q.size(3) <= 256, "head_dim is ", q.size(3), ", expected a multiple of 8 up to 256");
}

gather::Strided strided(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

bool aligned(const Tensor& x) {
  const int64_t bytes = x.element_size();
  bool good = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  for (int d = 0; d < 3; ++d) good &= x.size(d) == 1 || x.stride(d) * bytes % 16 == 0;
  return good;
}

int run(at::ScalarType type, const gather::Forward& f, void* stream) {
  switch (type) {
    case at::kFloat: return gather::forward_f32(f, stream);
    case at::kDouble: return gather::forward_f64(f, stream);
    case at::kBFloat16: return gather::forward_bf16(f, stream);
    case at::kHalf: return gather::forward_f16(f, stream);
    default: TORCH_CHECK(false, "q has dtype ", type, ", expected float32, float64, bfloat16 or float16");
  }
}

// As the kernels can read it. With 2 GiB or more between rows, and where several heads go together unaligned, that is a copy.
Tensor readable(const Tensor& x, const Rows& rows) {
  const bool near = x.size(2) == 1 || x.stride(2) * x.element_size() < (int64_t{1} << 31);
  return near && (rows.together == 1 || aligned(x)) ? x : x.clone(at::MemoryFormat::Contiguous);
}

std::tuple<Tensor, Tensor> forward(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Rows& rows, double scale) {
  check(q_in, k_in, v_in, rows);
  const c10::cuda::CUDAGuard guard(q_in.device());
  const Tensor q = readable(q_in, rows), k = readable(k_in, rows), v = readable(v_in, rows);
  Tensor out = at::empty_like(q);
  if (out.stride(3) != 1) out = at::empty(q.sizes(), q.options());  // q's rows overlap
  const auto accumulator = q.options().dtype(q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const Tensor lse = at::empty({q.size(0), q.size(1), q.size(2)}, accumulator);
  Tensor partial;
  gather::Forward f{strided(q), strided(k), strided(v), strided(out), lse.data_ptr()};
  f.row_start = rows.row_start.data_ptr<int64_t>();
  f.columns = rows.columns.data_ptr<int32_t>();
  f.head_variant = rows.head_variant.data_ptr<int32_t>();
  f.n_pieces = rows.pieces.size(0), f.n_splits = rows.splits.size(0);
  if (f.n_pieces) {
    partial = at::empty({q.size(0) * f.n_pieces * rows.together * (q.size(3) + 2)}, accumulator);
    f.partial = partial.data_ptr();
    f.pieces = reinterpret_cast<const gather::Piece*>(rows.pieces.data_ptr<int32_t>());
    f.splits = reinterpret_cast<const gather::Split*>(rows.splits.data_ptr<int32_t>());
  }
  f.longest = rows.longest, f.together = rows.together, f.apart = rows.apart;
  f.batch = q.size(0), f.heads = q.size(1), f.kv_heads = k.size(1), f.q_len = rows.q_len, f.head_dim = q.size(3);
  f.aligned = aligned(q) && aligned(k) && aligned(v) && aligned(out);
  f.scale = scale;
  TORCH_CHECK(f.aligned || f.together == 1, "out must begin at a multiple of 16 bytes");
  const int error = run(q.scalar_type(), f, at::cuda::getCurrentCUDAStream());
  C10_CUDA_CHECK(static_cast<cudaError_t>(error));
  return {out, lse};
}

}  // namespace

void bind_gather(pybind11::module_& m) {
  pybind11::class_<Rows>(m, "Rows").def(pybind11::init<const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, bool,
                                                       int64_t, int64_t>());
  m.def("gather_forward", &forward);
}

}  // namespace sparse_attention::bindings
