// The module that Python imports.
#include "bindings.h"

PYBIND11_MODULE(_kernels, m) {
  sparse_attention::bindings::bind_tile(m);
  sparse_attention::bindings::bind_blocks(m);
  sparse_attention::bindings::bind_calls(m);
  sparse_attention::bindings::bind_decode(m);
  sparse_attention::bindings::bind_eagle(m);
  sparse_attention::bindings::bind_gather(m);
}
