// Host side of the gather engine: the choice of a kernel, and the launch. No torch.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>

#include "join.cuh"

namespace sparse_attention::gather {
namespace {

constexpr int kMostTurns = 16;          // of a block; more would only lengthen its end
constexpr int64_t kManyBlocks = 2048;  // a block takes several turns of rows only while so many blocks are left

// Blocks of kWarps warps. Written without <<< >>>, so that a host's compiler reads it too.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, cudaStream_t stream, const Arguments&... arguments) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config{};
  config.gridDim = {unsigned(blocks), 1, 1}, config.blockDim = {32 * kWarps, 1, 1}, config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class S>
cudaError_t launch_rows(const Forward& f, cudaStream_t stream) {
  if (S::kApart && f.n_pieces) return cudaErrorInvalidValue;
  const auto blocks = [&](int turns) {
    const int64_t rows = kWarps * S::kRows * turns;
    return (f.q_len + rows - 1) / rows * (f.heads / S::kHeads) * f.batch;
  };
  int turns = kMostTurns;
  while (turns > 1 && blocks(turns) < kManyBlocks) turns /= 2;
  const int64_t piece_blocks = (int64_t(f.batch) * f.n_pieces + kWarps - 1) / kWarps;
  return launch(rows<S>, piece_blocks + blocks(turns), stream, f, int(piece_blocks), turns);
}

template <typename T, int kLanes, int kChunks, bool kApart>
cudaError_t launch_heads(const Forward& f, cudaStream_t stream) {
  constexpr int kElements = kChunks * kChunkBytes / sizeof(T);
  if (f.together == 1) return launch_rows<Shape<T, kLanes, kChunks, 1, true, kApart>>(f, stream);
  if constexpr (sizeof(T) < 8) {
    if (f.together == 2) return launch_rows<Shape<T, kLanes, kChunks, 2, true, kApart>>(f, stream);
    if constexpr (kElements <= 8) {  // for more there are no registers
      if (f.together == 4) return launch_rows<Shape<T, kLanes, kChunks, 4, true, kApart>>(f, stream);
    }
  }
  return cudaErrorInvalidValue;
}

template <typename T, int kLanes, int kChunks>
cudaError_t launch_shape(const Forward& f, cudaStream_t stream) {
  if (!f.aligned) return launch_rows<Shape<T, kLanes, kChunks, 1, false, false>>(f, stream);
  if constexpr (kLanes < 32 && sizeof(T) < 8) {
    if (f.apart) return launch_heads<T, kLanes, kChunks, true>(f, stream);
  }
  return launch_heads<T, kLanes, kChunks, false>(f, stream);
}

// The smallest of three shapes that holds head_dim: up to 64, 128 and 256 elements.
template <typename T>
cudaError_t launch_size(const Forward& f, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {  // more chunks a lane would hold more registers, fewer lanes a key save no arithmetic
    if (f.head_dim <= 64) return launch_shape<T, 8, 1>(f, stream);
    if (f.head_dim <= 128) return launch_shape<T, 16, 1>(f, stream);
    return launch_shape<T, 32, 1>(f, stream);
  } else if constexpr (sizeof(T) == 4) {  // four keys of a warp at once: a quarter of the exponentials, and three shuffles a score in place of five
    if (f.head_dim <= 64) return launch_shape<T, 8, 2>(f, stream);
    if (f.head_dim <= 128) return launch_shape<T, 8, 4>(f, stream);
    return launch_shape<T, 16, 4>(f, stream);
  } else {
    if (f.head_dim <= 64) return launch_shape<T, 32, 1>(f, stream);
    if (f.head_dim <= 128) return launch_shape<T, 32, 2>(f, stream);
    return launch_shape<T, 32, 4>(f, stream);
  }
}

template <typename T>
int launch_forward(const Forward& f, cudaStream_t stream) {
  const cudaError_t error = launch_size<T>(f, stream);
  if (error != cudaSuccess || f.n_splits == 0) return error;
  const int64_t warps = int64_t(f.batch) * f.n_splits * f.together * ((f.head_dim + 31) / 32);
  return launch(join_pieces<T>, (warps + kWarps - 1) / kWarps, stream, f);
}

}  // namespace
}  // namespace sparse_attention::gather
