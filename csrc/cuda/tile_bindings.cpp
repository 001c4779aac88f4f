// Between Python and the tile engine: checks, allocation, and the params.
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include <tuple>
#include <vector>

#include "bindings.h"
#include "tile.h"

namespace sparse_attention::bindings {

using at::Tensor;

const Tensor& table(const Tensor& x, at::ScalarType type, const char* name) {
  TORCH_CHECK(x.is_cuda() && x.scalar_type() == type && x.is_contiguous(), name, " must be a contiguous ", type, " CUDA tensor, got ",
              x.scalar_type(), " on ", x.device());
  return x;
}

struct Part {
  Part(int64_t stride, bool has_dead, const Tensor& work, const Tensor& starts, const Tensor& row_start, const Tensor& runs, const Tensor& masks,
       const Tensor& dead)
      : stride(stride), has_dead(has_dead), work(table(work, at::kInt, "work")), starts(table(starts, at::kInt, "starts")), row_start(table(row_start, at::kInt, "row_start")),
        runs(table(runs, at::kInt, "runs")), masks(table(masks, at::kLong, "masks")), dead(table(dead, at::kLong, "dead")) {
    TORCH_CHECK(work.dim() == 2 && work.size(1) == 12, "work has shape ", work.sizes(), ", expected [tiles, 12]");
  }
  int64_t stride;
  bool has_dead;
  Tensor work, starts, row_start, runs, masks, dead;
};

// What the tensor copy engine can read: aligned to 16 bytes in every direction, no dimension repeated.
Tensor copyable(const Tensor& x) {
  bool good = x.stride(3) == 1 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  for (int d = 0; d < 3; ++d) good &= x.size(d) == 1 || (x.stride(d) > 0 && x.stride(d) % 8 == 0);
  return good ? x : x.contiguous();
}

Strided strided(const Tensor& x) {
  const auto stride = [&](int d) { return x.size(d) == 1 ? int64_t{8} : x.stride(d); };
  return {x.data_ptr(), stride(0), stride(1), stride(2)};
}

void check_shapes(const Tensor& q, const Tensor& k, const Tensor& v, int64_t heads, int64_t q_len, int64_t kv_len) {
  TORCH_CHECK(q.is_cuda() && (q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf),
              "q must be a bfloat16 or float16 CUDA tensor, got ", q.scalar_type(), " on ", q.device());
  TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type() && k.device() == q.device() && v.device() == q.device(),
              "k and v must have the dtype and device of q");
  TORCH_CHECK(q.dim() == 4 && q.size(1) == heads && q.size(2) == q_len, "q has shape ", q.sizes(), ", the layout is for ", heads,
              " heads and ", q_len, " queries");
  TORCH_CHECK(k.dim() == 4 && k.size(0) == q.size(0) && k.size(2) == kv_len && k.size(3) == q.size(3) && heads % k.size(1) == 0 &&
                  v.sizes() == k.sizes(),
              "k and v have shapes ", k.sizes(), " and ", v.sizes(), ", the layout is for ", kv_len, " keys");
  TORCH_CHECK(q.size(3) % 8 == 0 && q.size(3) <= 256, "head_dim is ", q.size(3), ", expected a multiple of 8 up to 256");
}

std::tuple<Tensor, Tensor> forward(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const std::vector<Part>& parts,
                                   int64_t q_len, int64_t kv_len, int64_t keys, double scale) {
  check_shapes(q_in, k_in, v_in, q_in.size(1), q_len, kv_len);
  TORCH_CHECK(scale > 0, "scale is ", scale, ", expected a positive number");
  TORCH_CHECK(!parts.empty(), "a layout needs at least one part");
  const c10::cuda::CUDAGuard guard(q_in.device());
  const Tensor q = copyable(q_in), k = copyable(k_in), v = copyable(v_in);
  Tensor out = at::empty_like(q);
  if (!copyable(out).is_same(out)) out = at::empty(q.sizes(), q.options());
  const Tensor lse = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  const Tensor partial = parts.size() > 1 ? at::empty(q.sizes(), q.options().dtype(at::kFloat)) : Tensor();
  const auto stream = at::cuda::getCurrentCUDAStream();
  for (size_t n = 0; n < parts.size(); ++n) {
    const Part& part = parts[n];
    const bool first = n == 0, last = n + 1 == parts.size();
    Forward f{strided(q), strided(k), strided(v), strided(out)};
    f.partial = partial.defined() ? partial.data_ptr<float>() : nullptr;
    f.lse = lse.data_ptr<float>();
    f.work = part.work.data_ptr<int32_t>();
    f.starts = part.starts.data_ptr<int32_t>();
    f.row_start = part.row_start.data_ptr<int32_t>();
    f.runs = part.runs.data_ptr<int32_t>();
    f.masks = reinterpret_cast<const uint64_t*>(part.masks.data_ptr<int64_t>());
    f.dead = reinterpret_cast<const uint64_t*>(part.dead.data_ptr<int64_t>());
    f.n_work = part.work.size(0);
    f.batch = q.size(0), f.heads = q.size(1), f.kv_heads = k.size(1);
    f.q_len = q_len, f.kv_len = kv_len, f.head_dim = q.size(3);
    f.stride = part.stride, f.keys = keys;
    f.merge = first ? (last ? kAlone : kFirstPart) : (last ? kLastPart : kMiddlePart);
    f.has_dead = part.has_dead;
    f.processors = part.starts.numel() - 1;
    f.scale = scale;
    const int error = q.scalar_type() == at::kHalf ? sm90::forward_f16(f, stream) : sm90::forward_bf16(f, stream);
    C10_CUDA_CHECK(static_cast<cudaError_t>(error));
  }
  return {out, lse};
}

void bind_tile(pybind11::module_& m) {
  pybind11::class_<Part>(m, "Part").def(
      pybind11::init<int64_t, bool, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&>());
  m.def("sm90_forward", &forward);
}

}  // namespace sparse_attention::bindings
