#include "decode_launch.cuh"

namespace sparse_attention::sm90 {

int decode_bf16(const Decode& d, DecodeKernel kernel, void* stream) { return launch_decode<__nv_bfloat16>(d, kernel, static_cast<cudaStream_t>(stream)); }

}  // namespace sparse_attention::sm90
