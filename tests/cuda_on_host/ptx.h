// csrc/cuda/sm80/ptx.h for the host. What an asynchronous copy will overwrite is NaN from its start until it is waited for.
#pragma once
#include "threads.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {};

inline uint32_t __ballot_sync(unsigned, bool value) {
  struct {
    bool value;
    uint32_t all;
  } mine{value, 0};
  host::together(mine, [](auto** x) {
    uint32_t all = 0;
    for (int lane = 0; lane < 32; ++lane) all |= uint32_t{x[lane]->value} << lane;
    for (int lane = 0; lane < 32; ++lane) x[lane]->all = all;
  });
  return mine.all;
}

inline int __popcll(uint64_t x) { return __builtin_popcountll(x); }

// Of the whole warp, or by one lane for itself.
inline int __shfl_sync(unsigned lanes, int value, int from) {
  struct {
    int value, from;
  } mine{value, from};
  if (lanes == ~0u)
    host::together(mine, [](auto** x) {
      const int of = x[0]->from, brought = x[of]->value;
      for (int lane = 0; lane < 32; ++lane) x[lane]->value = brought;
    });
  return mine.value;
}

inline int __shfl_up_sync(unsigned, int value, int step) {
  struct {
    int value, got, step;
  } mine{value, value, step};
  host::together(mine, [](auto** x) {
    for (int lane = 0; lane < 32; ++lane) x[lane]->got = x[max(0, lane - x[lane]->step)]->value;
  });
  return mine.got;
}

namespace sparse_attention::sm80 {

inline int thread_anew() { return threadIdx.x; }

inline uint8_t* shared_memory;

inline uint32_t shared_address(const void* pointer) { return static_cast<const uint8_t*>(pointer) - shared_memory; }

inline void copy(uint8_t* to, const void* from, int bytes, bool real) {
  std::memset(to, 0xFF, bytes);
  host::self().copies.push_back([=] { real ? std::memcpy(to, from, bytes) : std::memset(to, 0, bytes); });
}

inline void copy_16(uint32_t to, const void* from, bool real) { copy(shared_memory + to, from, 16, real); }

template <int kBytes>
void copy_few(void* to, const void* from) {
  copy(static_cast<uint8_t*>(to), from, kBytes, true);
}

inline void copies_commit() { host::self().copies.push_back(nullptr); }  // the end of a group

template <int kLeft>
void copies_wait() {
  auto& copies = host::self().copies;
  auto groups = std::count(copies.begin(), copies.end(), nullptr);
  auto next = copies.begin();
  for (; groups > kLeft; ++next) *next ? (*next)() : void(--groups);
  copies.erase(copies.begin(), next);
}

struct MatrixLoad {
  uint32_t address, x[4];
};

inline uint32_t element(const MatrixLoad* row, int column) {
  uint16_t x;
  std::memcpy(&x, shared_memory + row->address + 2 * column, 2);
  return x;
}

inline void load_matrices(uint32_t (&x)[4], uint32_t address) {
  MatrixLoad mine{address};
  host::together(mine, [](MatrixLoad** l) {
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m) {
        const MatrixLoad* row = l[8 * m + lane / 4];
        l[lane]->x[m] = element(row, lane % 4 * 2) | element(row, lane % 4 * 2 + 1) << 16;
      }
  });
  std::copy(mine.x, mine.x + 4, x);
}

inline void load_matrices_transposed(uint32_t (&x)[4], uint32_t address) {
  MatrixLoad mine{address};
  host::together(mine, [](MatrixLoad** l) {
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m) {
        const MatrixLoad* const* row = &l[8 * m + lane % 4 * 2];
        l[lane]->x[m] = element(row[0], lane / 4) | element(row[1], lane / 4) << 16;
      }
  });
  std::copy(mine.x, mine.x + 4, x);
}

inline float low_half(uint32_t pair) {
  const uint32_t bits = pair << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float high_half(uint32_t pair) { return low_half(pair >> 16); }

inline uint32_t rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return std::isnan(x) ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

template <typename T>
uint32_t pack(float low, float high) {
  return rounded(low) | rounded(high) << 16;
}

struct Product {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

template <typename T>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Product mine{c, a, {b0, b1}};
  host::together(mine, [](Product** l) {
    float left[16][16], right[8][16];  // [row][k], [column][k]
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int k = i / 2 * 8 + lane % 4 * 2;
        float* row = left[lane / 4 + i % 2 * 8];
        row[k] = low_half(l[lane]->a[i]), row[k + 1] = high_half(l[lane]->a[i]);
        if (i % 2 == 0) right[lane / 4][k] = low_half(l[lane]->b[i / 2]), right[lane / 4][k + 1] = high_half(l[lane]->b[i / 2]);
      }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 16; ++k) l[lane]->c[i] += left[lane / 4 + i / 2 * 8][k] * right[lane % 4 * 2 + i % 2][k];
  });
}

inline float exp2_fast(float x) { return std::exp2(x); }

}  // namespace sparse_attention::sm80
