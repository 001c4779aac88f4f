// Host side of the gather engine: the choice of a kernel, and the launch. No torch.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>

#include "gather.cuh"

namespace sparse_attention::gather {
namespace {

constexpr int kMostTurns = 16;          // of a block; more would only lengthen its end
constexpr int64_t kManyBlocks = 2048;  // a block takes several turns of rows only while so many blocks are left

template <class S>
cudaError_t launch_rows(const Forward& f, cudaStream_t stream) {
  const auto blocks = [&](int turns) {
    const int64_t rows = kWarps * turns;
    return (f.q_len + rows - 1) / rows * (f.heads / S::kHeads) * f.batch;
  };
  int turns = kMostTurns;
  while (turns > 1 && blocks(turns) < kManyBlocks) turns /= 2;
  const int64_t piece_blocks = (int64_t(f.batch) * f.n_pieces + kWarps - 1) / kWarps;
  const int64_t all = piece_blocks + blocks(turns);
  if (all > INT32_MAX) return cudaErrorInvalidConfiguration;
  rows<S><<<unsigned(all), 32 * kWarps, 0, stream>>>(f, int(piece_blocks), turns);
  return cudaGetLastError();
}

template <typename T, int kLanes, int kChunks>
cudaError_t launch_heads(const Forward& f, cudaStream_t stream) {
  if (!f.aligned) return launch_rows<Shape<T, kLanes, kChunks, 1, false>>(f, stream);
  if constexpr (sizeof(T) < 8) {
    if (f.together == 4) return launch_rows<Shape<T, kLanes, kChunks, 4, true>>(f, stream);
    if (f.together == 2) return launch_rows<Shape<T, kLanes, kChunks, 2, true>>(f, stream);
  }
  return launch_rows<Shape<T, kLanes, kChunks, 1, true>>(f, stream);
}

// The smallest of three shapes that holds head_dim: up to 64, 128 and 256 elements.
template <typename T>
int launch_forward(const Forward& f, cudaStream_t stream) {
  constexpr int kLanes = std::min<int>(32, 64 * sizeof(T) / kChunkBytes);
  constexpr int kWider = std::min(32, 2 * kLanes), kWidest = std::min(32, 4 * kLanes);
  constexpr int kSize = sizeof(T) * 64 / kChunkBytes;  // chunks of 64 elements
  cudaError_t error;
  if (f.head_dim <= 64) {
    error = launch_heads<T, kLanes, kSize / kLanes>(f, stream);
  } else if (f.head_dim <= 128) {
    error = launch_heads<T, kWider, 2 * kSize / kWider>(f, stream);
  } else {
    error = launch_heads<T, kWidest, 4 * kSize / kWidest>(f, stream);
  }
  if (error != cudaSuccess || f.n_splits == 0) return error;
  const int64_t warps = int64_t(f.batch) * f.n_splits * f.together * ((f.head_dim + 31) / 32);
  join_pieces<T><<<unsigned((warps + kWarps - 1) / kWarps), 32 * kWarps, 0, stream>>>(f);
  return cudaGetLastError();
}

}  // namespace
}  // namespace sparse_attention::gather
