// The threads of one CUDA block, or of a cluster of blocks, as fibers of one host thread. Warps go ahead in random order from one meeting to the next. Libraries hide
// their symbols: several are loaded side by side, each with another ptx.h.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __noinline__
#define __align__(bytes)
#define __launch_bounds__(...)
#define __grid_constant__

using std::max, std::min;

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct Index {
  uint32_t x, y = 0, z = 0;
};
inline Index threadIdx, blockIdx, gridDim;

namespace host {

// Where `members` threads wait for each other.
struct Meeting {
  int arrived = 0, epoch = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  std::vector<std::function<void()>> copies;  // on their way
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps, blocks;  // several blocks: of a cluster
  std::vector<void*> brought;  // by each thread to its warp's meeting
  Meeting all;
  int threads = 0;  // of each of the blocks
  bool any[16];     // of a block's threads
  ucontext_t scheduler;
  std::function<void()> body;
  int meetings = 0;  // so far: progress
  bool barriers = true;
};
inline Block block;

inline int current;  // the fiber that runs

inline Fiber& self() { return block.fibers[current]; }

inline void leave_to_others() { swapcontext(&self().context, &block.scheduler); }

// The last of `members` threads to arrive acts before all go on.
template <class F>
void meet(Meeting& at, int members, F act) {
  const int epoch = at.epoch;
  ++block.meetings;
  if (++at.arrived < members) {
    while (at.epoch == epoch) leave_to_others();
    return;
  }
  act();
  at.arrived = 0, ++at.epoch;
}

// Done by a warp at once: act(x) gets what each lane brought, x[lane].
template <class A, class F>
void together(A& mine, F act) {
  const int warp = current / 32;
  block.brought[current] = &mine;
  meet(block.warps[warp], 32, [&] { act(reinterpret_cast<A**>(&block.brought[32 * warp])); });
}

inline void enter() {
  block.body();
  self().done = true;
  leave_to_others();
}

// Runs body() in every thread of a block, or of a cluster of blocks that follow blockIdx.x. Throws if threads wait for each other forever.
inline void run_block(int threads_of_block, std::mt19937& random, std::function<void()> body, int blocks = 1) {
  const int threads = threads_of_block * blocks, first_block = blockIdx.x;
  block.fibers = std::vector<Fiber>(threads);
  block.warps.assign(threads / 32, {}), block.blocks.assign(blocks, {}), block.brought.resize(threads), block.all = {};
  block.threads = threads_of_block, block.body = std::move(body);
  for (Fiber& fiber : block.fibers) {
    constexpr size_t kStack = 256 * 1024;
    fiber.stack = std::make_unique_for_overwrite<char[]>(kStack);
    std::memset(fiber.stack.get(), 0xFF, kStack);  // what is used before it is written should be seen
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, enter, 0);
  }
  for (int left = threads, idle = 0; left > 0;) {
    const int warp = random() % (threads / 32), before = block.meetings, left_before = left;
    for (uint32_t t = 32 * warp; t < 32u * (warp + 1); ++t) {
      if (block.fibers[t].done) continue;
      current = t, threadIdx.x = t % threads_of_block, blockIdx.x = first_block + t / threads_of_block;
      swapcontext(&block.scheduler, &block.fibers[t].context);
      left -= block.fibers[t].done;
    }
    idle = block.meetings == before && left == left_before ? idle + 1 : 0;
    if (idle > 1000) throw std::runtime_error("the threads of a block wait for each other");
  }
  blockIdx.x = first_block;
}

// `used` of struct Tables for tiles of two rows of words.
inline std::vector<uint64_t> used_words(const uint64_t* bits, int64_t tiles, int words) {
  const int wide = (words + 63) / 64;
  std::vector<uint64_t> used(bits ? tiles * wide : 0);
  for (int64_t tile = 0; bits && tile < tiles; ++tile)
    for (int word = 0; word < words; ++word)
      used[tile * wide + word / 64] |= uint64_t{(bits[2 * tile * words + word] | bits[(2 * tile + 1) * words + word]) != 0} << word % 64;
  return used;
}

}  // namespace host

inline void __syncthreads() {
  if (host::block.barriers) host::meet(host::block.blocks[host::current / host::block.threads], host::block.threads, [] {});
}

inline bool __syncthreads_or(bool value) {
  bool& any = host::block.any[host::current / host::block.threads];
  __syncthreads();
  any = false;
  __syncthreads();
  any |= value;
  __syncthreads();
  return any;
}

inline void __syncwarp() { host::meet(host::block.warps[host::current / 32], 32, [] {}); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  struct {
    T value, got;
    int mask;
  } mine{value, value, mask};
  host::together(mine, [](auto** x) {
    for (int lane = 0; lane < 32; ++lane) x[lane]->got = x[lane ^ x[lane]->mask]->value;
  });
  return mine.got;
}

inline bool __any_sync(unsigned, bool value) {
  bool mine = value;
  host::together(mine, [](bool** x) {
    const bool any = std::any_of(x, x + 32, [](bool* one) { return *one; });
    for (int lane = 0; lane < 32; ++lane) *x[lane] = any;
  });
  return mine;
}

template <class T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at += value;
  return old;
}

inline void atomicOr(uint32_t* to, uint32_t bits) { *to |= bits; }
inline float __log2f(float x) { return std::log2(x); }
inline float __logf(float x) { return std::log(x); }
inline float __expf(float x) { return std::exp(x); }
inline int __ffsll(uint64_t x) { return __builtin_ffsll(x); }
inline float2 __ldcs(const float2* from) { return *from; }
inline float __ldcg(const float* from) { return *from; }
inline float2 __ldcg(const float2* from) { return *from; }
