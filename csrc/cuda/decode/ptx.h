// Beside sm80's instructions: products of float32 in parts of TF32, and clusters, where a device has them.
#pragma once
#include "../sm80/ptx.h"

namespace sparse_attention::decoding {

// ---- c[16, 8] += a[16, 8] b[8, 8], TF32

__device__ __forceinline__ void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

__device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }

// ---- the L2 cache

// What copies tell L2 of what they read: that it may be the first to make room, or nothing in particular.
__device__ __forceinline__ uint64_t once_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ uint64_t usual_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0;" : "=l"(policy));
  return policy;
}

// sm80::copy_16 with a policy.
__device__ __forceinline__ void copy_16_under(uint32_t to, const void* from, bool real, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from), "r"(real ? 16 : 0), "l"(policy));
}

// ---- clusters and dependent launches

// The two halves of a meeting of the cluster. Relaxed: where nothing was written that others read, or what was has had its fence.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_sync() { cluster_arrive(), cluster_wait(); }

// The same, where nothing was written that others read.
__device__ __forceinline__ void cluster_part() { cluster_arrive_relaxed(), cluster_wait(); }

// The same variable of another block of the cluster.
template <class T>
__device__ __forceinline__ const T* of_block(const T* mine, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t theirs;
  asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(rank));
  return reinterpret_cast<const T*>(theirs);
#else
  return mine;
#endif
}

// The next launch may be made ready from here on; it waits for this one's results itself.
__device__ __forceinline__ void allow_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace sparse_attention::decoding
