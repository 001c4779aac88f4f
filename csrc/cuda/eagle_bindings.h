// What the bindings of the tree operations share: checks of shape, dtype and place, so that no launch can write outside a tensor.
#pragma once
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include <torch/csrc/utils/pybind.h>

#include <limits>
#include <optional>

#include "eagle/eagle.h"

namespace sparse_attention::bindings {

using at::Tensor;
using Maybe = std::optional<Tensor>;

void bind_eagle_cache(pybind11::module_& m);

inline eagle::Dtype eagle_dtype(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return eagle::Dtype::f32;
    case at::kDouble: return eagle::Dtype::f64;
    case at::kBFloat16: return eagle::Dtype::bf16;
    case at::kHalf: return eagle::Dtype::f16;
    default: TORCH_CHECK(false, "dtype is ", x.scalar_type(), ", expected float32, float64, bfloat16 or float16");
  }
}

inline const Tensor& checked(const Tensor& x, const char* name, at::IntArrayRef shape, const Tensor& like) {
  TORCH_CHECK(x.is_cuda() && x.device() == like.device() && x.is_contiguous() && x.sizes() == shape, name,
              " must be a contiguous tensor of shape ", shape, " on ", like.device(), ", got ", x.sizes(), " on ", x.device());
  TORCH_CHECK(!x.is_neg(), name, " must not be lazily negated: call .resolve_neg()");
  return x;
}
inline int64_t* longs(const Tensor& x, const char* name, at::IntArrayRef shape, const Tensor& like) {
  TORCH_CHECK(x.scalar_type() == at::kLong, name, " must be int64, got ", x.scalar_type());
  return checked(x, name, shape, like).data_ptr<int64_t>();
}
inline int64_t* longs(const Maybe& x, const char* name, at::IntArrayRef shape, const Tensor& like) {
  return x ? longs(*x, name, shape, like) : nullptr;
}

// A size that the kernels count in 32 bits.
inline int as_int(int64_t size, const char* name) {
  TORCH_CHECK(size >= 0 && size < std::numeric_limits<int>::max() / 2, name, " is ", size, ", expected less than 2^30");
  return int(size);
}

inline void launched(int error) { C10_CUDA_CHECK(static_cast<cudaError_t>(error)); }
inline void* stream() { return at::cuda::getCurrentCUDAStream(); }

}  // namespace sparse_attention::bindings
