// Host side of the sm90 tier: tensor maps, the choice of a kernel, the launch. No torch.
#pragma once
#include <algorithm>
#include <cstring>

#include "forward.cuh"
#include "maps.cuh"

namespace sparse_attention::sm90 {
namespace {

template <typename T>
bool encode_all(Maps& maps, const Forward& f) {
  const auto type = IsHalf<T>::value ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const Sequences queries{type, f.head_dim, f.heads, f.batch, f.q_len, f.stride};
  const Sequences keys{type, f.head_dim, f.kv_heads, f.batch, f.kv_len, f.stride};
  bool good = true;
  for (const bool longer : {false, true}) {
    if (!longer || f.q_len % f.stride) {
      good &= encode(&maps.q[longer], f.q, queries, longer, kTileQueries);
      if (!writes_partial(f.merge)) good &= encode(&maps.out[longer], f.out, queries, longer, kTileQueries / 2);
    }
    if (!longer || f.kv_len % f.stride) {
      good &= encode(&maps.k[longer], f.k, keys, longer, f.keys);
      good &= encode(&maps.v[longer], f.v, keys, longer, f.keys);
    }
  }
  return good;
}

bool equal(const Strided& a, const Strided& b) { return a.batch == b.batch && a.head == b.head && a.row == b.row; }

// The maps of a call: those of the last one like it, at other addresses, or new ones.
template <typename T>
bool make_maps(Maps& maps, const Forward& f) {
  static_assert(sizeof(Maps) == sizeof(KeptMaps::maps));
  const Strided like[4] = {f.q, f.k, f.v, f.out};
  const int32_t sizes[5] = {f.batch, f.kv_heads, f.head_dim, IsHalf<T>::value, 1};
  KeptMaps* const kept = f.kept;
  if (kept && replacer() && std::equal(sizes, sizes + 5, kept->sizes) && std::equal(like, like + 4, kept->like, equal)) {
    std::memcpy(&maps, kept->maps, sizeof maps);
    bool good = true;
    for (const bool longer : {false, true}) {
      if (!longer || f.q_len % f.stride) {
        good &= replacer()(&maps.q[longer], f.q.data) == CUDA_SUCCESS;
        if (!writes_partial(f.merge)) good &= replacer()(&maps.out[longer], f.out.data) == CUDA_SUCCESS;
      }
      if (!longer || f.kv_len % f.stride) {
        good &= replacer()(&maps.k[longer], f.k.data) == CUDA_SUCCESS;
        good &= replacer()(&maps.v[longer], f.v.data) == CUDA_SUCCESS;
      }
    }
    return good;
  }
  if (!encode_all<T>(maps, f)) return false;
  if (kept) {
    std::memcpy(kept->maps, &maps, sizeof maps);
    std::copy(like, like + 4, kept->like);
    std::copy(sizes, sizes + 5, kept->sizes);
  }
  return true;
}

template <class S, typename T, Merge kMerge, bool kBury, bool kHalves = false>
cudaError_t launch(const Maps& maps, const Params& p, int processors, cudaStream_t stream) {
  static std::atomic<uint64_t> allowed{0};
  const auto kernel = forward<S, T, kMerge, kBury, kHalves>;
  constexpr int bytes = sizeof(Memory<S>) + 1024;
  static_assert(bytes <= 227 * 1024, "what a block may have");
  const cudaError_t error = allow(kernel, bytes, allowed);
  if (error != cudaSuccess) return error;
  kernel<<<processors, S::kThreads, bytes, stream>>>(maps, p);
  return cudaGetLastError();
}

template <class S, typename T, bool kBury>
cudaError_t launch_merge(const Forward& f, const Maps& maps, const Params& p, cudaStream_t stream) {
  if constexpr (S::kKeys == 64 && S::kDim <= 128)
    if (f.merge == kAlone && f.tables.bits) return launch<S, T, kAlone, kBury, true>(maps, p, f.processors, stream);
  switch (f.merge) {
    case kAlone: return launch<S, T, kAlone, kBury>(maps, p, f.processors, stream);
    case kFirstPart: return launch<S, T, kFirstPart, kBury>(maps, p, f.processors, stream);
    case kMiddlePart: return launch<S, T, kMiddlePart, kBury>(maps, p, f.processors, stream);
    default: return launch<S, T, kLastPart, kBury>(maps, p, f.processors, stream);
  }
}

template <class S, typename T>
cudaError_t launch_shape(const Forward& f, const Maps& maps, const Params& p, cudaStream_t stream) {
  return f.has_dead ? launch_merge<S, T, true>(f, maps, p, stream) : launch_merge<S, T, false>(f, maps, p, stream);
}

template <typename T>
int launch_forward(const Forward& f, cudaStream_t stream) {
  if (!encoder()) return cudaErrorNotSupported;
  Maps maps;
  if (!make_maps<T>(maps, f)) return cudaErrorInvalidValue;
  const Params p{f.tables, f.partial, f.lse, f.cuts, f.heads, f.heads / f.kv_heads, f.q_len, f.head_dim, f.scale * 1.4426950408889634f};
  if (f.keys == 128 && f.head_dim <= 64) return launch_shape<Shape<64, 128, 4>, T>(f, maps, p, stream);
  if (f.keys == 128 && f.head_dim <= 128) return launch_shape<Shape<128, 128, 2>, T>(f, maps, p, stream);
  if (f.keys != 64) return cudaErrorInvalidValue;
  if (f.head_dim <= 64) return launch_shape<Shape<64, 64, 4>, T>(f, maps, p, stream);
  if (f.head_dim <= 128) return launch_shape<Shape<128, 64, 5>, T>(f, maps, p, stream);
  if (f.head_dim <= 192) return launch_shape<Shape<192, 64, 2>, T>(f, maps, p, stream);
  return launch_shape<Shape<256, 64, 2>, T>(f, maps, p, stream);
}

}  // namespace
}  // namespace sparse_attention::sm90
