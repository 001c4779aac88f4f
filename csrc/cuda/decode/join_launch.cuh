// Host side of the second launch. No torch.
#pragma once
#include <cuda_runtime.h>

#include "join.cuh"

namespace sparse_attention::decoding {
namespace {

// Whether the current device has clusters and dependent launches.
bool is_hopper_or_later() {
  int device, major;
  return cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
}

// Made ready while the blocks before it still work, where the device can.
template <typename T>
cudaError_t launch_join(const Decode& d, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3((d.group * d.q_len * (d.head_dim / 4) + 127) / 128, d.kv_heads, d.batch), config.blockDim = dim3(128);
  config.stream = stream;
  cudaLaunchAttribute overlap[1];
  overlap[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap[0].val.programmaticStreamSerializationAllowed = 1;
  if (is_hopper_or_later()) config.attrs = overlap, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, d.splits / d.cluster <= 8 ? join<T, 8> : join<T, 16>, d);
}

}  // namespace
}  // namespace sparse_attention::decoding
