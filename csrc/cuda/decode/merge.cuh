// Softmaxes over different keys made one: of a block's warps, of a cluster's blocks.
#pragma once
#include "shape.cuh"

namespace sparse_attention::decoding {

// Where the output of a row goes: to the caller's tensors, or, where `join` merges, to its parts.
template <class S>
struct Target {
  using T = typename S::T;
  float* lse;  // or null
  float* part;
  T* out;

  __device__ Target(const Work<S>& work, int row) {
    const Decode& d = work.d;
    const int64_t group = int64_t{work.batch} * d.kv_heads + work.kv_head;
    if (d.splits == d.cluster) {
      lse = d.lse ? d.lse + group * work.rows + row : nullptr, part = nullptr, out = work.row_of(d.out, row);
    } else {
      const int64_t at = (int64_t{blockIdx.x} * d.batch * d.kv_heads + group) * work.rows + row;
      lse = d.part_lse + at, part = d.part_out + at * d.head_dim, out = nullptr;
    }
  }

  __device__ __forceinline__ void set_lse(float2 end) const {
    if (lse) *lse = end.y == 0 ? -INFINITY : (end.x + __log2f(end.y)) * 0.6931471805599453f;
  }

  __device__ __forceinline__ void set(int column, float2 x) const {
    if (part || S::kSingle) *reinterpret_cast<float2*>((part ? part : reinterpret_cast<float*>(out)) + column) = x;
    else *reinterpret_cast<uint32_t*>(out + column) = sm80::pack<T>(x.x, x.y);
  }
};

// Four columns of a row. end: the base in powers of 2, and the sum.
struct Merged {
  float2 end{-INFINITY, 0};
  float value[4]{};

  // Parts numbered from 0 to count - 1; eight are asked for at a time.
  template <class End, class Value>
  __device__ __forceinline__ void add(int count, End end_of, Value value_of) {
    for (int first = 0; first < count; first += 8) {
      float2 ends[8];
      float4 values[8];
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (first + i < count) ends[i] = end_of(first + i), values[i] = value_of(first + i);
        else ends[i] = {-INFINITY, 0}, values[i] = {0, 0, 0, 0};
      float top = end.x;
#pragma unroll
      for (int i = 0; i < 8; ++i) top = fmaxf(top, ends[i].x);
      const float base = top == -INFINITY ? 0.0f : top, worth = sm80::exp2_fast(end.x - base);
      end = {top, end.y * worth};
#pragma unroll
      for (int c = 0; c < 4; ++c) value[c] *= worth;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float weight = sm80::exp2_fast(ends[i].x - base);
        end.y = fmaf(weight, ends[i].y, end.y);
        value[0] = fmaf(weight, values[i].x, value[0]), value[1] = fmaf(weight, values[i].y, value[1]);
        value[2] = fmaf(weight, values[i].z, value[2]), value[3] = fmaf(weight, values[i].w, value[3]);
      }
    }
  }

  template <class S>
  __device__ __forceinline__ void write(const Work<S>& work, int row, int column) const {
    const Target<S> target(work, row);
    if (column == 0) target.set_lse(end);
    if (column >= work.d.head_dim) return;
    const float keep = end.y == 0 ? 0 : 1 / end.y;
    target.set(column, {value[0] * keep, value[1] * keep});
    target.set(column + 2, {value[2] * keep, value[3] * keep});
  }
};

template <class S>
__device__ __forceinline__ int real_rows(const Work<S>& work) {
  return min(S::kRows, work.rows - work.first_row);
}

// The warps that share a tile's keys; what they have found is written, or is the block's part in the cluster.
template <class S>
__device__ __forceinline__ void merge_warps(const Work<S>& work, Shared<S>& shared) {
  constexpr int kQuads = S::kDim / 4;
  for (int n = threadIdx.x; n < real_rows(work) * kQuads; n += S::kThreads) {
    const int row = n / kQuads, column = n % kQuads * 4;
    Merged all;
    all.add(S::kKeyWarps, [&](int warp) { return shared.ends[warp][row]; },
            [&](int warp) { return *reinterpret_cast<const float4*>(shared.part(warp) + row * S::kPartPitch + column); });
    if (work.d.cluster == 1) {
      all.write(work, work.first_row + row, column);
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
    all.add(work.d.cluster, [&](int block) { return *of_block(&shared.ends[kEnds][row], block); },
            [&](int block) { return *of_block(reinterpret_cast<const float4*>(shared.part(0) + row * S::kPartPitch + column), block); });
    all.write(work, work.first_row + row, column);
  }
  cluster_sync();  // nobody leaves while others read
}

}  // namespace sparse_attention::decoding
