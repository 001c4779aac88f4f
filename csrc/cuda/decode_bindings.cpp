// Between Python and decoding: checks, allocation, and the params.
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include <optional>
#include <tuple>

#include "bindings.h"
#include "decode/plan.h"
#include "decode_bindings.h"

namespace sparse_attention::bindings {
namespace {

Strided strided(const Tensor& x, const char* name) {
  TORCH_CHECK(readable(x), name, " has strides ", x.strides(), " at ", x.data_ptr(), ", expected multiples of 16 bytes, and 1 for the last");
  const auto stride = [&](int d) { return x.size(d) == 1 ? int64_t{8} : x.stride(d); };
  return {x.data_ptr(), stride(0), stride(1), stride(2)};
}

DecodeDevice device_of() {
  const auto* properties = at::cuda::getCurrentDeviceProperties();
#ifdef SPARSE_ATTENTION_SM90
  constexpr bool kWarpgroups = true;
#else
  constexpr bool kWarpgroups = false;
#endif
  return {properties->multiProcessorCount, properties->major >= 9, kWarpgroups};
}

int launch(const Decode& d, DecodeKernel kernel, at::ScalarType type, void* stream) {
#ifdef SPARSE_ATTENTION_SM90
  if (by_warpgroups(kernel)) return type == at::kHalf ? sm90::decode_f16(d, kernel, stream) : sm90::decode_bf16(d, kernel, stream);
#endif
  if (type == at::kFloat) return decoding::run_f32(d, kernel, stream);
  return type == at::kHalf ? decoding::run_f16(d, kernel, stream) : decoding::run_bf16(d, kernel, stream);
}

}  // namespace

// A contiguous last dimension, rows at multiples of 16 bytes.
bool readable(const Tensor& x) {
  bool good = x.stride(3) == 1 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  for (int d = 0; d < 3; ++d) good &= x.size(d) == 1 || (x.stride(d) > 0 && x.stride(d) * int64_t(x.element_size()) % 16 == 0);
  return good;
}

std::tuple<Tensor, Tensor> decode_forward(const Tensor& q_in, const Tensor& k, const Tensor& v, const std::optional<Tensor>& lengths, int64_t length,
                                          const std::optional<Tensor>& ancestors, int64_t window, int64_t sinks,
                                          const std::optional<Tensor>& block_table, double scale, bool with_lse, int64_t kernel_wanted,
                                          int64_t splits_wanted) {
  const auto type = q_in.scalar_type();
  TORCH_CHECK(q_in.is_cuda() && (type == at::kBFloat16 || type == at::kHalf || type == at::kFloat),
              "q must be a bfloat16, float16 or float32 CUDA tensor, got ", type, " on ", q_in.device());
  for (const Tensor* x : {&k, &v}) {
    TORCH_CHECK(x->scalar_type() == type && x->device() == q_in.device(), "k_cache and v_cache must have the dtype and device of q");
    TORCH_CHECK(x->dim() == 4 && x->sizes() == k.sizes() && x->size(3) == q_in.size(3) && q_in.size(1) % x->size(1) == 0,
                "k_cache and v_cache have shapes ", k.sizes(), " and ", v.sizes(), ", q ", q_in.sizes());
  }
  TORCH_CHECK(q_in.size(3) % 8 == 0 && q_in.size(3) <= 256, "head_dim is ", q_in.size(3), ", expected a multiple of 8 up to 256");
  TORCH_CHECK(scale > 0, "scale is ", scale, ", expected a positive number");
  const auto of_device = [&](const Tensor& x, at::ScalarType wanted, const char* name) {
    TORCH_CHECK(x.device() == q_in.device() && x.scalar_type() == wanted && x.is_contiguous(), name, " must be a contiguous ", wanted,
                " tensor on ", q_in.device(), ", got ", x.scalar_type(), " on ", x.device());
  };
  const c10::cuda::CUDAGuard guard(q_in.device());
  const Tensor q = readable(q_in) ? q_in : q_in.clone(at::MemoryFormat::Contiguous);
  const Tensor out = at::empty(q.sizes(), q.options());
  const Tensor lse = with_lse ? at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat)) : Tensor();
  Decode d{strided(q, "q"), strided(out, "out"), strided(k, "k_cache"), strided(v, "v_cache")};
  d.lse = with_lse ? lse.data_ptr<float>() : nullptr;
  d.batch = q.size(0), d.heads = q.size(1), d.kv_heads = k.size(1), d.q_len = q.size(2), d.head_dim = q.size(3);
  if (q.numel() == 0) return {out, lse};
  if (lengths) {
    of_device(*lengths, at::kLong, "lengths");
    TORCH_CHECK(lengths->dim() == 1 && lengths->size(0) == d.batch, "lengths has shape ", lengths->sizes(), ", expected [", d.batch, "]");
    d.lengths = lengths->data_ptr<int64_t>();
  }
  d.length = length;
  d.page = d.capacity = k.size(2), d.pages = k.size(0);
  if (block_table) {
    of_device(*block_table, at::kInt, "block_table");
    TORCH_CHECK(block_table->dim() == 2 && block_table->size(0) == d.batch, "block_table has shape ", block_table->sizes(), ", expected [", d.batch, ", pages]");
    TORCH_CHECK(d.page >= 16 && d.page <= 256 && (d.page & (d.page - 1)) == 0, "pages hold ", d.page, " keys, expected a power of two from 16 to 256");
    d.block_table = block_table->data_ptr<int32_t>();
    d.table_width = block_table->size(1);
    d.capacity = d.page * d.table_width;
  } else {
    TORCH_CHECK(k.size(0) == d.batch, "k_cache has shape ", k.sizes(), ", expected a batch of ", d.batch);
  }
  if (ancestors) {
    of_device(*ancestors, at::kLong, "ancestors");
    TORCH_CHECK(ancestors->dim() == 3 && (ancestors->size(0) == 1 || ancestors->size(0) == d.batch) && ancestors->size(1) == d.q_len &&
                    ancestors->size(2) == (d.q_len + 63) / 64 && d.q_len <= 1024,
                "ancestors has shape ", ancestors->sizes(), ", expected [1 or ", d.batch, ", ", d.q_len, " (at most 1,024), ", (d.q_len + 63) / 64, "]");
    d.ancestors = reinterpret_cast<const uint64_t*>(ancestors->data_ptr<int64_t>());
    d.ancestor_batch = ancestors->size(0), d.words = ancestors->size(2);
  }
  d.window = std::min<int64_t>(window, d.capacity), d.sinks = std::min<int64_t>(sinks, d.capacity);
  d.scale = scale;
  d.group = d.heads / d.kv_heads, d.group_inverse = ((uint64_t{1} << 32) + d.group - 1) / d.group;
  d.kv_inverse = ((uint64_t{1} << 32) + d.kv_heads - 1) / d.kv_heads;
  const DecodeDevice device = device_of();
  const auto kernel = kernel_wanted < 0 ? choose_kernel(d, q.element_size(), device) : static_cast<DecodeKernel>(kernel_wanted);
  TORCH_CHECK_VALUE(d.batch <= kMostBlocks, "q has shape ", q.sizes(), ", a batch of ", d.batch, "; expected at most ", kMostBlocks, " on CUDA");
  const int64_t blocks = row_blocks(d, kernel, q.element_size());
  TORCH_CHECK_VALUE(blocks <= kMostBlocks, "q has shape ", q.sizes(), " over ", d.kv_heads, " heads of keys, ", blocks,
                    " tiles of queries for each request; expected at most ", kMostBlocks, " on CUDA");
  split_keys(d, kernel, q.element_size(), device);
  if (splits_wanted > 0) {
    d.cluster = device.clusters && splits_wanted <= most_cluster(kernel) ? splits_wanted : 1;
    d.splits = splits_wanted;
  }
  const int64_t rows = d.splits > d.cluster ? int64_t{d.splits} * q.numel() / d.head_dim : 0;
  const Tensor parts = rows ? at::empty({rows * (d.head_dim + 1)}, q.options().dtype(at::kFloat)) : Tensor();
  if (rows) d.part_out = parts.data_ptr<float>(), d.part_lse = d.part_out + rows * d.head_dim;
  C10_CUDA_CHECK(static_cast<cudaError_t>(launch(d, kernel, type, at::cuda::getCurrentCUDAStream())));
  return {out, lse};
}

void bind_decode(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("decode_forward", &decode_forward, py::arg("q"), py::arg("k_cache"), py::arg("v_cache"), py::arg("lengths"), py::arg("length"),
        py::arg("ancestors"), py::arg("window"), py::arg("sinks"), py::arg("block_table"), py::arg("scale"), py::arg("with_lse") = true,
        py::arg("kernel") = -1, py::arg("splits") = 0);
  m.def("decode_plain", &decode_plain);
}

}  // namespace sparse_attention::bindings
