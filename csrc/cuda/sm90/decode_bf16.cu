#include "decode_launch.cuh"

namespace sparse_attention::sm90 {

int decode_bf16(const Decode& d, void* stream) { return launch_decode<__nv_bfloat16>(d, static_cast<cudaStream_t>(stream)); }

}  // namespace sparse_attention::sm90
