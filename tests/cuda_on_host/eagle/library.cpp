// The module of the tree operations alone, in one unit: torch's headers take the longest.
#include "eagle_bindings.cpp"
#include "eagle_cache_bindings.cpp"

PYBIND11_MODULE(eagle_on_host, m) { sparse_attention::bindings::bind_eagle(m); }
