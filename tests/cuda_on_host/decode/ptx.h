// csrc/cuda/decode/ptx.h for the host. The blocks of a cluster lie one behind the other in shared_memory.
#pragma once
#include <map>

#include "../sm80/ptx.h"

namespace sparse_attention::decoding {

inline size_t shared_bytes;  // of a block

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return std::isnan(x) ? bits : (bits + 0x1000) & ~0x1FFFu;
}

struct Single {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Single mine{c, a, {b0, b1}};
  host::together(mine, [](Single** l) {
    float left[16][8], right[8][8];  // [row][k], [column][k]
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        left[lane / 4 + i % 2 * 8][lane % 4 + i / 2 * 4] = as_float(l[lane]->a[i]);
        if (i < 2) right[lane / 4][lane % 4 + 4 * i] = as_float(l[lane]->b[i]);
      }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        double sum = l[lane]->c[i];
        for (int k = 0; k < 8; ++k) sum += double(left[lane / 4 + i / 2 * 8][k]) * right[lane % 4 * 2 + i % 2][k];
        const float nearest = static_cast<float>(sum);  // tensor cores cut off
        l[lane]->c[i] = std::fabs(double{nearest}) > std::fabs(sum) ? std::nextafterf(nearest, 0) : nearest;
      }
  });
}

inline void cluster_sync() { host::meet(host::block.all, host::block.fibers.size(), [] {}); }

inline void cluster_part() { cluster_sync(); }

inline uint64_t once_policy() { return 0; }
inline uint64_t usual_policy() { return 0; }
inline void copy_16_under(uint32_t to, const void* from, bool real, uint64_t) { sm80::copy_16(to, from, real); }

inline std::map<int, int> arrivals;  // of each thread: the epoch that it waits for the end of
inline void cluster_arrive() {
  host::Meeting& at = host::block.all;
  ++host::block.meetings;
  arrivals[host::current] = at.epoch;
  if (++at.arrived == int(host::block.fibers.size())) at.arrived = 0, ++at.epoch;
}
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() {
  while (host::block.all.epoch == arrivals[host::current]) host::leave_to_others();
}

template <class T>
const T* of_block(const T* mine, int rank) {
  const auto distance = (rank - host::current / host::block.threads) * static_cast<ptrdiff_t>(shared_bytes);
  return reinterpret_cast<const T*>(reinterpret_cast<const uint8_t*>(mine) + distance);
}

inline void allow_next() {}
inline void wait_for_previous() {}

}  // namespace sparse_attention::decoding
