// Eager calls that were made before: from three Python tensors to the launch, with nothing of Python in between.
#include <ATen/ATen.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <vector>

#include "bindings.h"
#include "tile_bindings.h"

namespace sparse_attention::bindings {
namespace {

namespace py = pybind11;

// Whether a mode, a transform or autocast wants to see the call.
bool watched() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() || at::impl::torch_function_mode_enabled() ||
         c10::impl::tls_local_dispatch_key_set().included_.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         at::autocast::is_autocast_enabled(at::kCUDA);
}

// The calls of one pattern: shapes, dtype, device and impl lead to a layout with the default scale.
class Calls {
 public:
  explicit Calls(py::object pattern) : pattern(std::move(pattern)) {}

  void add(const Tensor& q, const Tensor& k, const Tensor& v, py::str impl, py::object layout, py::object filter, double scale) {
    const Filter* by = filter.is_none() ? nullptr : filter.cast<const Filter*>();
    calls.push_back({{q.sizes().vec(), k.sizes().vec(), v.sizes().vec()}, q.scalar_type(), q.device(), impl, layout, filter,
                     layout.cast<const Layout*>(), by, scale});
  }

  // The output, or None where the call is not known or not plain.
  py::object run(py::handle q_, py::handle k_, py::handle v_, py::handle impl) const {
    const std::array<py::handle, 3> handles{q_, k_, v_};
    for (const auto& x : handles)
      if (!THPVariable_CheckExact(x.ptr())) return py::none();
    const Tensor &q = THPVariable_Unpack(q_.ptr()), &k = THPVariable_Unpack(k_.ptr()), &v = THPVariable_Unpack(v_.ptr());
    const std::array<const Tensor*, 3> tensors{&q, &k, &v};
    for (const Call& call : calls)
      if (call.impl.is(impl) && like(call, tensors)) {
        if (watched()) return py::none();
        if (c10::GradMode::is_enabled() && (q.requires_grad() || k.requires_grad() || v.requires_grad())) return py::none();
        const c10::AutoGradMode no_grad(false);
        return py::reinterpret_steal<py::object>(
            THPVariable_Wrap(std::get<0>(tile_forward(q, k, v, *call.launches, call.scale, call.filtered, false))));
      }
    return py::none();
  }

 private:
  struct Call {
    std::array<std::vector<int64_t>, 3> shapes;
    at::ScalarType dtype;
    at::Device device;
    py::str impl;
    py::object layout, filter;
    const Layout* launches;
    const Filter* filtered;
    double scale;
  };

  static bool like(const Call& call, const std::array<const Tensor*, 3>& tensors) {
    for (int n = 0; n < 3; ++n) {
      const Tensor& x = *tensors[n];
      if (x.layout() != at::kStrided || x.scalar_type() != call.dtype || x.device() != call.device || x.sizes() != at::IntArrayRef(call.shapes[n]) ||
          x.stride(3) != 1)
        return false;
    }
    return true;
  }

  py::object pattern;  // kept, so that nothing else gets its id
  std::vector<Call> calls;
};

}  // namespace

void bind_calls(pybind11::module_& m) {
  py::class_<Calls>(m, "Calls")
      .def(py::init<py::object>())
      .def("add", &Calls::add)
      .def("run", &Calls::run)
      .def_property_readonly("nbytes", [](const Calls&) { return 0; });
}

}  // namespace sparse_attention::bindings
