// Eager `decode` of plain arguments: from Python objects to the launch, with nothing of Python in between.
#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>

#include "decode_bindings.h"

namespace sparse_attention::bindings {
namespace {

namespace py = pybind11;

// Whether a mode or a transform wants to see the call.
bool watched() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() || at::impl::torch_function_mode_enabled() ||
         c10::impl::tls_local_dispatch_key_set().included_.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// An int of at least `least`, or `otherwise` for None; least - 1 for anything else.
int64_t integer(py::handle x, int64_t least, int64_t otherwise) {
  if (x.is_none()) return otherwise;
  if (!PyLong_CheckExact(x.ptr())) return least - 1;
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(x.ptr(), &overflow);
  return overflow || value < least ? least - 1 : value;
}

bool is_plain(py::handle x) { return THPVariable_CheckExact(x.ptr()); }

// The tensor of an argument that may be None, of this type and device, dense; false if it is anything else.
bool optional_tensor(py::handle x, at::ScalarType type, const Tensor& q, std::optional<Tensor>* found) {
  if (x.is_none()) return true;
  if (!is_plain(x)) return false;
  const Tensor& tensor = THPVariable_Unpack(x.ptr());
  if (tensor.scalar_type() != type || tensor.device() != q.device() || tensor.layout() != at::kStrided || !tensor.is_contiguous()) return false;
  *found = tensor;
  return true;
}

}  // namespace

py::object decode_plain(py::handle q_, py::handle k_, py::handle v_, py::handle lengths_, py::handle ancestors_, py::handle window_, py::handle sinks_,
                        py::handle block_table_, py::handle scale_, bool with_lse) {
  const py::object no = py::none();
  if (!is_plain(q_) || !is_plain(k_) || !is_plain(v_) || watched()) return no;
  const Tensor &q = THPVariable_Unpack(q_.ptr()), &k = THPVariable_Unpack(k_.ptr()), &v = THPVariable_Unpack(v_.ptr());
  const auto type = q.scalar_type();
  if (!q.is_cuda() || (type != at::kHalf && type != at::kBFloat16 && type != at::kFloat)) return no;
  for (const Tensor* x : {&q, &k, &v})
    if (x->layout() != at::kStrided || x->dim() != 4 || x->numel() == 0 || x->scalar_type() != type || x->device() != q.device() || !readable(*x)) return no;
  if (k.sizes() != v.sizes() || k.size(3) != q.size(3) || q.size(1) % k.size(1) || q.size(3) % 8 || q.size(3) > 256) return no;
  if (c10::GradMode::is_enabled() && (q.requires_grad() || k.requires_grad() || v.requires_grad())) return no;

  std::optional<Tensor> lengths, ancestors, table;
  if (!optional_tensor(ancestors_, at::kLong, q, &ancestors) || !optional_tensor(block_table_, at::kInt, q, &table)) return no;
  if (table && (table->dim() != 2 || table->size(0) != q.size(0) || k.size(2) < 16 || k.size(2) > 256 || (k.size(2) & (k.size(2) - 1)))) return no;
  if (!table && k.size(0) != q.size(0)) return no;
  if (ancestors && (ancestors->dim() != 3 || (ancestors->size(0) != 1 && ancestors->size(0) != q.size(0)) || ancestors->size(1) != q.size(2) ||
                    ancestors->size(2) != (q.size(2) + 63) / 64 || q.size(2) > 1024))
    return no;
  int64_t length = 0;
  if (PyLong_CheckExact(lengths_.ptr())) {
    length = integer(lengths_, 0, -1);
    if (length < 0 || length > (table ? k.size(2) * table->size(1) : k.size(2))) return no;
  } else if (lengths_.is_none() || !optional_tensor(lengths_, at::kLong, q, &lengths) || lengths->dim() != 1 || lengths->size(0) != q.size(0)) {
    return no;
  }
  const int64_t window = integer(window_, 1, -1), sinks = integer(sinks_, 0, -1);
  if (window == 0 || sinks < 0) return no;
  double scale = 1 / std::sqrt(double(q.size(3)));
  if (!scale_.is_none()) {
    if (!PyFloat_CheckExact(scale_.ptr())) return no;
    scale = PyFloat_AS_DOUBLE(scale_.ptr());
    if (!(scale > 0) || std::isinf(scale)) return no;
  }
  const c10::AutoGradMode no_grad(false);
  auto [out, lse] = decode_forward(q, k, v, lengths, length, ancestors, window, sinks, table, scale, with_lse);
  const auto wrap = [](Tensor& x) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(x))); };
  if (!with_lse) return wrap(out);
  return py::make_tuple(wrap(out), wrap(lse));
}

}  // namespace sparse_attention::bindings
