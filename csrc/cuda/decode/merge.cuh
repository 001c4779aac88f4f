// Softmaxes over different keys made one: of a block's warps, of a cluster's blocks.
#pragma once
#include "shape.cuh"

namespace sparse_attention::decoding {

// Four columns of a row. end: the base in powers of 2, and the sum.
struct Merged {
  float2 end{-INFINITY, 0};
  float value[4]{};

  // Parts numbered from 0 to count - 1; kBatch are asked for at a time.
  template <int kBatch, class End, class Value>
  __device__ __forceinline__ void add(int count, End end_of, Value value_of) {
    for (int first = 0; first < count; first += kBatch) {
      float2 ends[kBatch];
      float4 values[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (first + i < count) ends[i] = end_of(first + i), values[i] = value_of(first + i);
        else ends[i] = {-INFINITY, 0}, values[i] = {0, 0, 0, 0};
      float top = end.x;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) top = fmaxf(top, ends[i].x);
      const float base = top == -INFINITY ? 0.0f : top, worth = sm80::exp2_fast(end.x - base);
      end = {top, end.y * worth};
#pragma unroll
      for (int c = 0; c < 4; ++c) value[c] *= worth;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const float weight = sm80::exp2_fast(ends[i].x - base);
        end.y = fmaf(weight, ends[i].y, end.y);
        value[0] = fmaf(weight, values[i].x, value[0]), value[1] = fmaf(weight, values[i].y, value[1]);
        value[2] = fmaf(weight, values[i].z, value[2]), value[3] = fmaf(weight, values[i].w, value[3]);
      }
    }
  }

  __device__ __forceinline__ float lse() const { return end.y == 0 ? -INFINITY : (end.x + __log2f(end.y)) * 0.6931471805599453f; }

  template <typename T>
  __device__ __forceinline__ void store(T* to) const {
    const float keep = end.y == 0 ? 0 : 1 / end.y;
    const float4 x{value[0] * keep, value[1] * keep, value[2] * keep, value[3] * keep};
    if constexpr (sizeof(T) == 4) *reinterpret_cast<float4*>(to) = x;
    else *reinterpret_cast<uint2*>(to) = {sm80::pack<T>(x.x, x.y), sm80::pack<T>(x.z, x.w)};
  }
};

// To the caller's tensors, or, where `join` merges, to its parts.
template <class S>
__device__ __forceinline__ void write(const Merged& all, const Work<S>& work, int row, int column) {
  const Decode& d = work.d;
  const int64_t group = int64_t{work.batch} * d.kv_heads + work.kv_head;
  if (d.splits == d.cluster) {
    if (column == 0 && d.lse) d.lse[lse_of(d, work.batch, work.kv_head, row)] = all.lse();
    if (column < d.head_dim) all.store(row_of<typename S::T>(d, d.out, work.batch, work.kv_head, row) + column);
  } else {
    const int64_t at = (int64_t{blockIdx.x} * d.batch * d.kv_heads + group) * work.rows + row;
    if (column == 0) d.part_lse[at] = all.lse();
    if (column < d.head_dim) all.store(d.part_out + at * d.head_dim + column);
  }
}

template <class S>
__device__ __forceinline__ int real_rows(const Work<S>& work) {
  return min(S::kRows, work.rows - work.first_row);
}

// The warps that share a tile's keys, or the only one; what they have found is written, or is the block's part in the cluster.
template <class S>
__device__ __forceinline__ void merge_warps(const Work<S>& work, Shared<S>& shared) {
  constexpr int kQuads = S::kDim / 4;
  for (int n = threadIdx.x; n < real_rows(work) * kQuads; n += S::kThreads) {
    const int row = n / kQuads, column = n % kQuads * 4;
    Merged all;
    all.template add<S::kKeyWarps>(S::kKeyWarps, [&](int warp) { return shared.ends[warp][row]; },
            [&](int warp) { return *reinterpret_cast<const float4*>(shared.part(warp) + row * S::kPartPitch + column); });
    if (work.d.cluster == 1) {
      write(all, work, work.first_row + row, column);
    } else {
      *reinterpret_cast<float4*>(shared.part(0) + row * S::kPartPitch + column) = {all.value[0], all.value[1], all.value[2], all.value[3]};
      if (column == 0) shared.ends[S::kKeyWarps][row] = all.end;
    }
  }
}

// The splits of a cluster, each block for some columns of some rows.
template <class S>
__device__ __forceinline__ void merge_cluster(const Work<S>& work, Shared<S>& shared) {
  constexpr int kQuads = S::kDim / 4, kEnds = S::kKeyWarps > 1 ? S::kKeyWarps : 0;
  cluster_sync();
  for (int n = blockIdx.x * S::kThreads + threadIdx.x; n < real_rows(work) * kQuads; n += work.d.cluster * S::kThreads) {
    const int row = n / kQuads, column = n % kQuads * 4;
    Merged all;
    all.template add<16>(work.d.cluster, [&](int block) { return *of_block(&shared.ends[kEnds][row], block); },
            [&](int block) { return *of_block(reinterpret_cast<const float4*>(shared.part(0) + row * S::kPartPitch + column), block); });
    write(all, work, work.first_row + row, column);
  }
  cluster_part();  // nobody leaves while others read
}

}  // namespace sparse_attention::decoding
