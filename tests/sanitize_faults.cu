// Faults for tests/sanitize.py: racecheck must find the one, synccheck the other. In the namespace that the tools are told to follow.
namespace sparse_attention::planted {
namespace {

// Warps read what others have written, without a barrier in between.
__global__ void race(int* out) {
  __shared__ int word[64];
  word[threadIdx.x] = out[threadIdx.x];
  out[threadIdx.x] = word[63 - threadIdx.x];
}

// Each warp waits for all at a barrier of its own, which CUDA leaves undefined.
__global__ void divergent(int* out) {
  __shared__ int word[64];
  if (threadIdx.x < 32) {
    word[threadIdx.x] = out[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = word[63 - threadIdx.x];
  } else {
    word[threadIdx.x] = 3 * out[threadIdx.x] + 1;
    __syncthreads();
    out[threadIdx.x] += word[threadIdx.x - 32];
  }
}

int finished() {
  const cudaError_t launched = cudaGetLastError(), done = cudaDeviceSynchronize();
  return launched ? launched : done;
}

}  // namespace
}  // namespace sparse_attention::planted

// out: 64 words of device memory. Both return a cudaError_t.
extern "C" __attribute__((visibility("default"))) int race(int* out) {
  sparse_attention::planted::race<<<1, 64>>>(out);
  return sparse_attention::planted::finished();
}

extern "C" __attribute__((visibility("default"))) int divergent(int* out) {
  sparse_attention::planted::divergent<<<1, 64>>>(out);
  return sparse_attention::planted::finished();
}
