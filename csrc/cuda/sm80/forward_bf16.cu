#include "launch.cuh"

namespace sparse_attention::sm80 {

int forward_bf16(const Forward& f, void* stream) { return launch_forward<__nv_bfloat16>(f, static_cast<cudaStream_t>(stream)); }

int resident_blocks(int head_dim) { return count_resident_blocks<__nv_bfloat16>(head_dim); }

}  // namespace sparse_attention::sm80
