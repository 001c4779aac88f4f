#include "launch.cuh"

namespace sparse_attention::decoding {

int run_f32(const Decode& d, DecodeKernel kernel, void* stream) { return run<float>(d, kernel, static_cast<cudaStream_t>(stream)); }

}  // namespace sparse_attention::decoding
