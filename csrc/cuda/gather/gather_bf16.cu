#include "launch.cuh"

namespace sparse_attention::gather {

int forward_bf16(const Forward& f, void* stream) { return launch_forward<__nv_bfloat16>(f, static_cast<cudaStream_t>(stream)); }

}  // namespace sparse_attention::gather
