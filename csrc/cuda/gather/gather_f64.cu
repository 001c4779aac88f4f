#include "launch.cuh"

namespace sparse_attention::gather {

int forward_f64(const Forward& f, void* stream) { return launch_forward<double>(f, static_cast<cudaStream_t>(stream)); }

}  // namespace sparse_attention::gather
