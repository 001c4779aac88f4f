#include "decode_launch.cuh"

namespace sparse_attention::sm90 {

int decode_f16(const Decode& d, DecodeKernel kernel, void* stream) { return launch_decode<__half>(d, kernel, static_cast<cudaStream_t>(stream)); }

}  // namespace sparse_attention::sm90
