// Hopper's instructions as functions: mbarriers, the bulk tensor copy engine, warpgroup matrix products. PTX ISA 8.0 and later.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace sparse_attention::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- mbarriers: `phase` is the parity of the completion waited for

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

// After the last barrier_init of a block.
__device__ __forceinline__ void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t phase) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(phase)
      : "memory");
}

// The same barrier of another block of the cluster.
__device__ __forceinline__ void barrier_arrive_at(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

template <int kThreads>
__device__ __forceinline__ void named_sync(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

template <int kThreads>
__device__ __forceinline__ void named_arrive(int id) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void registers_more() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void registers_fewer() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- tensor copies: coordinates (column, residue, step, head, batch)

__device__ __forceinline__ void map_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void tensor_load(
    void* to, const CUtensorMap* map, uint64_t* barrier, int column, int residue, int step, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(residue), "r"(step), "r"(head), "r"(batch)
      : "memory");
}

// policy: for L2, of decode/ptx.h
__device__ __forceinline__ void tensor_load(
    void* to, const CUtensorMap* map, uint64_t* barrier, int column, int residue, int step, int head, int batch, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(residue), "r"(step), "r"(head), "r"(batch), "l"(policy)
      : "memory");
}

// The same into every block of a cluster of `blocks`, at the same place of its shared memory, and for its own barrier.
__device__ __forceinline__ void tensor_load_all(
    void* to, const CUtensorMap* map, uint64_t* barrier, int column, int residue, int step, int head, int batch, uint64_t policy, int blocks) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8, %9;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(residue), "r"(step), "r"(head), "r"(batch), "h"(uint16_t((1 << blocks) - 1)), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void tensor_store(
    const CUtensorMap* map, const void* from, int column, int residue, int step, int head, int batch) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
               "r"(shared_address(from)), "r"(column), "r"(residue), "r"(step), "r"(head), "r"(batch)
               : "memory");
}

__device__ __forceinline__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until the sources of all stores may be written again.
__device__ __forceinline__ void store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// ---- warpgroup matrix products

__device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kLeft>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// Descriptor of a tile of rows of 128 bytes, swizzled by 128 bytes. `leading`: bytes between blocks of 64 columns, for the
// transposed operand; rows come in groups of 8, 1024 bytes apart.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t leading) {
  return (uint64_t{(address & 0x3FFFF) >> 4}) | (uint64_t{leading >> 4} << 16) | (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 62);
}

// Of what lies `bytes`, a multiple of 16, behind in shared memory.
__device__ __forceinline__ uint64_t behind(uint64_t descriptor, int bytes) {
  return descriptor >> 32 << 32 | (static_cast<uint32_t>(descriptor) + bytes / 16);
}

// Tells the compiler that all threads of a warp have the same.
__device__ __forceinline__ uint32_t uniform(uint32_t x) { return __shfl_sync(~0u, x, 0); }

// Keeps the compiler from moving reads and writes of accumulators across a product that runs.
template <int kCount>
__device__ __forceinline__ void pin(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

template <typename T>
struct IsHalf {
  static constexpr bool value = false;
};
template <>
struct IsHalf<__half> {
  static constexpr bool value = true;
};

// ---- arithmetic

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t both;
  if constexpr (IsHalf<T>::value) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

#define SA_R4(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define SA_R16(c, i) SA_R4(c, i), SA_R4(c, i + 4), SA_R4(c, i + 8), SA_R4(c, i + 12)
#define SA_R32(c, i) SA_R16(c, i), SA_R16(c, i + 16)
#define SA_LIST32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, " \
  "%27, %28, %29, %30, %31"
#define SA_LIST64 \
  SA_LIST32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, " \
  "%56, %57, %58, %59, %60, %61, %62, %63"

// c[64 rows, kN] (+)= a[64, 16] b[16, kN]^T: both from shared memory, columns contiguous.
template <typename T>
__device__ __forceinline__ void product_shared(float (&c)[32], uint64_t a, uint64_t b, int add) {
#define SA_PRODUCT(type)                                                                                              \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                                          \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" SA_LIST32 "}, %32, %33, p, 1, 1, 0, 0;\n}\n" \
               : SA_R32(c, 0)                                                                                         \
               : "l"(a), "l"(b), "r"(add))
  if constexpr (IsHalf<T>::value) SA_PRODUCT("f16");
  else SA_PRODUCT("bf16");
#undef SA_PRODUCT
}

template <typename T>
__device__ __forceinline__ void product_shared(float (&c)[64], uint64_t a, uint64_t b, int add) {
#define SA_PRODUCT(type)                                                                                               \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                           \
               "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" SA_LIST64 "}, %64, %65, p, 1, 1, 0, 0;\n}\n" \
               : SA_R32(c, 0), SA_R32(c, 32)                                                                           \
               : "l"(a), "l"(b), "r"(add))
  if constexpr (IsHalf<T>::value) SA_PRODUCT("f16");
  else SA_PRODUCT("bf16");
#undef SA_PRODUCT
}

// c[64 rows, kN] += a[64, 16] b[16, kN], or without `add` c = a b: a in registers, b in shared memory with its rows contiguous.
template <typename T>
__device__ __forceinline__ void product_registers(float (&c)[32], const uint32_t (&a)[4], uint64_t b, int add) {
#define SA_PRODUCT(type)                                                                                             \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                                          \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" SA_LIST32                            \
               "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}\n"                                                      \
               : SA_R32(c, 0)                                                                                        \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add))
  if constexpr (IsHalf<T>::value) SA_PRODUCT("f16");
  else SA_PRODUCT("bf16");
#undef SA_PRODUCT
}

template <typename T>
__device__ __forceinline__ void product_registers(float (&c)[64], const uint32_t (&a)[4], uint64_t b, int add) {
#define SA_PRODUCT(type)                                                                                             \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                                                          \
               "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" SA_LIST64                           \
               "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}\n"                                                      \
               : SA_R32(c, 0), SA_R32(c, 32)                                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add))
  if constexpr (IsHalf<T>::value) SA_PRODUCT("f16");
  else SA_PRODUCT("bf16");
#undef SA_PRODUCT
}

#undef SA_R4
#undef SA_R16
#undef SA_R32
#undef SA_LIST32
#undef SA_LIST64

}  // namespace sparse_attention::sm90
