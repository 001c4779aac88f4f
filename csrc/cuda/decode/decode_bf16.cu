#include "launch.cuh"

namespace sparse_attention::decoding {

int run_bf16(const Decode& d, DecodeKernel kernel, void* stream) { return run<__nv_bfloat16>(d, kernel, static_cast<cudaStream_t>(stream)); }

}  // namespace sparse_attention::decoding
