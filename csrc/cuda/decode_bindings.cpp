// Between Python and decoding: checks, allocation, and the params.
#ifdef SPARSE_ATTENTION_SM90
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "bindings.h"
#include "decode.h"

namespace sparse_attention::bindings {
namespace {

using at::Tensor;

Strided strided(const Tensor& x, const char* name) {
  bool good = x.stride(3) == 1 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  for (int d = 0; d < 3; ++d) good &= x.size(d) == 1 || (x.stride(d) > 0 && x.stride(d) % 8 == 0);
  TORCH_CHECK(good, name, " has strides ", x.strides(), ", expected multiples of 8 elements, 16-byte aligned, and 1 for the last");
  const auto stride = [&](int d) { return x.size(d) == 1 ? int64_t{8} : x.stride(d); };
  return {x.data_ptr(), stride(0), stride(1), stride(2)};
}

// As many blocks as there are multiprocessors, and at least one key tile for each split.
int splits_of(const Decode& d) {
  constexpr int kQueries = 128;
  const int keys = d.head_dim <= 128 ? 128 : 64, rows = d.heads / d.kv_heads * d.q_len;
  const int64_t blocks = int64_t{d.batch} * d.kv_heads * ((rows + kQueries - 1) / kQueries);
  int64_t tiles = (d.capacity + keys - 1) / keys;
  if (d.window >= 0) tiles = std::min<int64_t>(tiles, (d.sinks + keys - 1) / keys + (d.window + d.q_len + keys - 1) / keys + 1);
  return static_cast<int>(std::max<int64_t>(1, std::min(tiles, at::cuda::getCurrentDeviceProperties()->multiProcessorCount / blocks)));
}

// lengths: int64 [batch]; ancestors: int64 [batch or 1, q_len, words] or None; window: -1 for none; block_table: int32 [batch, most pages]
// or None, with caches [pages, kv_heads, page, head_dim]. Whatever lengths and the table hold, nothing outside the cache is read.
std::tuple<Tensor, Tensor> decode_forward(const Tensor& q_in, const Tensor& k, const Tensor& v, const Tensor& lengths,
                                          const std::optional<Tensor>& ancestors, int64_t window, int64_t sinks,
                                          const std::optional<Tensor>& block_table, double scale) {
  TORCH_CHECK(q_in.is_cuda() && (q_in.scalar_type() == at::kBFloat16 || q_in.scalar_type() == at::kHalf),
              "q must be a bfloat16 or float16 CUDA tensor, got ", q_in.scalar_type(), " on ", q_in.device());
  for (const Tensor* x : {&k, &v}) {
    TORCH_CHECK(x->scalar_type() == q_in.scalar_type() && x->device() == q_in.device(), "k_cache and v_cache must have the dtype and device of q");
    TORCH_CHECK(x->dim() == 4 && x->sizes() == k.sizes() && x->size(3) == q_in.size(3) && q_in.size(1) % x->size(1) == 0,
                "k_cache and v_cache have shapes ", k.sizes(), " and ", v.sizes(), ", q ", q_in.sizes());
  }
  TORCH_CHECK(q_in.size(3) % 8 == 0 && q_in.size(3) <= 256, "head_dim is ", q_in.size(3), ", expected a multiple of 8 up to 256");
  TORCH_CHECK(scale > 0, "scale is ", scale, ", expected a positive number");
  const auto of_device = [&](const Tensor& x, at::ScalarType type, const char* name) {
    TORCH_CHECK(x.device() == q_in.device() && x.scalar_type() == type && x.is_contiguous(), name, " must be a contiguous ", type, " tensor on ",
                q_in.device(), ", got ", x.scalar_type(), " on ", x.device());
  };
  of_device(lengths, at::kLong, "lengths");
  TORCH_CHECK(lengths.dim() == 1 && lengths.size(0) == q_in.size(0), "lengths has shape ", lengths.sizes(), ", expected [", q_in.size(0), "]");
  const c10::cuda::CUDAGuard guard(q_in.device());
  const Tensor q = q_in.contiguous();
  const Tensor out = at::empty_like(q);
  const Tensor lse = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  Decode d{strided(q, "q"), strided(out, "out"), strided(k, "k_cache"), strided(v, "v_cache")};
  d.lse = lse.data_ptr<float>();
  d.lengths = lengths.data_ptr<int64_t>();
  d.batch = q.size(0), d.heads = q.size(1), d.kv_heads = k.size(1), d.q_len = q.size(2), d.head_dim = q.size(3);
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
                    ancestors->size(2) == (d.q_len + 63) / 64,
                "ancestors has shape ", ancestors->sizes(), ", expected [1 or ", d.batch, ", ", d.q_len, ", ", (d.q_len + 63) / 64, "]");
    d.ancestors = reinterpret_cast<const uint64_t*>(ancestors->data_ptr<int64_t>());
    d.ancestor_batch = ancestors->size(0), d.words = ancestors->size(2);
  }
  d.window = std::min<int64_t>(window, d.capacity), d.sinks = std::min<int64_t>(sinks, d.capacity);
  d.scale = scale;
  d.splits = splits_of(d);
  const int64_t rows = int64_t{d.splits} * q.numel() / d.head_dim;
  const Tensor parts = d.splits > 1 ? at::empty({rows * (d.head_dim + 1)}, lse.options()) : Tensor();
  if (d.splits > 1) d.part_out = parts.data_ptr<float>(), d.part_lse = d.part_out + rows * d.head_dim;
  const auto stream = at::cuda::getCurrentCUDAStream();
  const int error = q.scalar_type() == at::kHalf ? sm90::decode_f16(d, stream) : sm90::decode_bf16(d, stream);
  C10_CUDA_CHECK(static_cast<cudaError_t>(error));
  return {out, lse};
}

}  // namespace

void bind_decode(pybind11::module_& m) { m.def("decode_forward", &decode_forward); }

}  // namespace sparse_attention::bindings
#endif
