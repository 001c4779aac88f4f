// What each file of bindings adds to the module. Only the files named *bindings.* and module.cpp include torch.
#pragma once
#include <torch/csrc/utils/pybind.h>

namespace sparse_attention::bindings {

void bind_blocks(pybind11::module_& m);
void bind_calls(pybind11::module_& m);
void bind_decode(pybind11::module_& m);
void bind_tile(pybind11::module_& m);
void bind_eagle(pybind11::module_& m);
void bind_gather(pybind11::module_& m);

}  // namespace sparse_attention::bindings
