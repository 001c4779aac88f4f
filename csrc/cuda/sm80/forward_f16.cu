#include "launch.cuh"

namespace sparse_attention::sm80 {

int forward_f16(const Forward& f, void* stream) { return launch_forward<__half>(f, static_cast<cudaStream_t>(stream)); }

}  // namespace sparse_attention::sm80
