// Host side of the sm80 tier: the choice of a kernel, the launch. No torch.
#pragma once
#include <cuda_runtime.h>

#include "forward.cuh"

namespace sparse_attention::sm80 {
namespace {

constexpr int kLeastShared = 100 * 1024;  // a multiprocessor's on compute capability 8.6, 8.9 and 12.0
constexpr int kReserved = 1024;           // of it for each block

using Wide128 = Shape<128, 64, 2, 2>;
using Narrow128 = Shape<128, 32, 2, 2>;
static_assert(2 * (sizeof(Shared<Narrow128>) + kReserved) <= kLeastShared);

// Whether a multiprocessor of the current device has room for two blocks of steps of 64 keys.
bool has_room() {
  int device, bytes;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device) == cudaSuccess &&
         bytes >= 2 * static_cast<int>(sizeof(Shared<Wide128>) + kReserved);
}

template <class S, typename T>
cudaError_t prepare() {
  static_assert(sizeof(Shared<S>) + kReserved <= kLeastShared);
  return cudaFuncSetAttribute(forward<S, T>, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared<S>));
}

// Calls f(Shape) with the kernel's shape for this head_dim.
template <class F>
auto with_shape(int head_dim, F f) {
  if (head_dim <= 64) return f(Shape<64, 64, 2, 3>());
  if (head_dim <= 128) return has_room() ? f(Wide128()) : f(Narrow128());
  if (head_dim <= 192) return f(Shape<192, 64, 1, 1>());
  return f(Shape<256, 32, 1, 1>());
}

// Blocks that a multiprocessor of the current device holds; 0 if that cannot be found out.
template <typename T>
int count_resident_blocks(int head_dim) {
  return with_shape(head_dim, [](auto shape) {
    using S = decltype(shape);
    int blocks = 0;
    if (prepare<S, T>() != cudaSuccess) return 0;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, forward<S, T>, S::kThreads, sizeof(Shared<S>));
    return blocks;
  });
}

Strided in_bytes(const Strided& x) { return {x.data, 2 * x.batch, 2 * x.head, 2 * x.row}; }

template <typename T>
int launch_forward(const Forward& f, cudaStream_t stream) {
  if (f.keys != 64 && f.keys != 128) return cudaErrorInvalidValue;
  const Params p{f.tables, in_bytes(f.q), in_bytes(f.k), in_bytes(f.v), in_bytes(f.out), f.partial, f.lse, f.heads, f.heads / f.kv_heads,
                 f.q_len, f.kv_len, f.head_dim, f.keys, f.merge, f.scale * 1.4426950408889634f};
  return with_shape(f.head_dim, [&](auto shape) {
    using S = decltype(shape);
    if (const cudaError_t error = prepare<S, T>()) return error;
    forward<S, T><<<f.processors, S::kThreads, sizeof(Shared<S>), stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace
}  // namespace sparse_attention::sm80
