// csrc/cuda/sm90/ptx.h for the host. Copies of the tensor copy engine arrive when somebody waits for a barrier, in random order; until
// then their destination is NaN.
#pragma once
#include <map>

#include "../decode/ptx.h"

struct CUtensorMap {
  uint8_t* data;
  int64_t sizes[5], strides[5];  // in elements; of (column, residue, step, head, batch)
  int rows, beside = 1;          // of a box; of them those of one step
};

namespace sparse_attention::sm90 {

inline void __threadfence() {}

inline uint8_t* shared_memory;
inline uint32_t shared_address(const void* pointer) { return static_cast<const uint8_t*>(pointer) - shared_memory; }

struct Barrier {
  int expected = 0, pending = 0, completed = 0;
  int64_t bytes = 0;
};

struct Engine {
  std::map<const void*, Barrier> barriers;
  std::map<int, host::Meeting> named;
  std::vector<host::Meeting> quads, warpgroups;
  std::vector<void*> brought;
  std::vector<std::function<void()>> copies;
  std::mt19937 random;
};
inline Engine engine;

inline void settle(Barrier& b) {
  ++host::block.meetings;
  if (b.pending == 0 && b.bytes == 0) ++b.completed, b.pending = b.expected;
}

inline void barrier_init(uint64_t* barrier, uint32_t arrivals) { engine.barriers[barrier] = {int(arrivals), int(arrivals)}; }
inline void barriers_ready() {}
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  Barrier& b = engine.barriers.at(barrier);
  b.bytes += bytes, --b.pending;
  settle(b);
}
inline void barrier_arrive(uint64_t* barrier) {
  Barrier& b = engine.barriers.at(barrier);
  if (--b.pending < 0) throw std::logic_error("a barrier has more arrivals than it was made for");
  settle(b);
}
inline void barrier_arrive_at(uint64_t* barrier, uint32_t rank) { barrier_arrive(const_cast<uint64_t*>(decoding::of_block(barrier, rank))); }
inline void barrier_wait(uint64_t* barrier, uint32_t phase) {
  Barrier& b = engine.barriers.at(barrier);
  while ((b.completed & 1) == static_cast<int>(phase)) {
    if (!engine.copies.empty()) {
      std::swap(engine.copies[engine.random() % engine.copies.size()], engine.copies.back());
      const auto finish = engine.copies.back();
      engine.copies.pop_back();
      finish();
    }
    host::leave_to_others();
  }
}

inline void named_arrive_at(int id, int threads, bool wait) {
  host::Meeting& at = engine.named[id + 16 * (host::current / host::block.threads)];
  if (wait) return host::meet(at, threads, [] {});
  ++host::block.meetings;
  if (++at.arrived == threads) at.arrived = 0, ++at.epoch;
}
template <int kThreads>
void named_sync(int id) {
  named_arrive_at(id, kThreads, true);
}
template <int kThreads>
void named_arrive(int id) {
  named_arrive_at(id, kThreads, false);
}
template <int>
void registers_more() {}
template <int>
void registers_fewer() {}
inline void fence_async() {}
inline void map_prefetch(const CUtensorMap*) {}
inline void store_commit() {}
inline void store_wait_read() {}
inline void products_fence() {}
inline void products_commit() {}
template <int>
void products_wait() {}
template <int kCount>
void pin(float (&)[kCount]) {}

inline uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

// Calls each(element of the tensor or null, offset in shared memory) for a box.
template <class F>
void box(const CUtensorMap& map, uint32_t base, int column, int residue, int step, int head, int batch, F each) {
  for (int r = 0; r < map.rows; ++r)
    for (int c = 0; c < 64; ++c) {
      const int64_t at[5] = {column + c, residue + r % map.beside, step + r / map.beside, head, batch};
      int64_t offset = 0;
      bool inside = true;
      for (int d = 0; d < 5; ++d) inside &= at[d] >= 0 && at[d] < map.sizes[d], offset += at[d] * map.strides[d];
      each(inside ? map.data + 2 * offset : nullptr, swizzled(base + r * 128 + c * 2));
    }
}

inline void tensor_load(void* to, const CUtensorMap* map, uint64_t* barrier, int column, int residue, int step, int head, int batch) {
  const uint32_t base = shared_address(to);
  if (base % 1024) throw std::logic_error("a swizzled box begins at a multiple of 1024 bytes");
  const CUtensorMap copied = *map;
  std::memset(to, 0xFF, map->rows * 128);
  engine.copies.push_back([=] {
    box(copied, base, column, residue, step, head, batch, [](const uint8_t* from, uint32_t place) {
      from ? std::memcpy(shared_memory + place, from, 2) : std::memset(shared_memory + place, 0, 2);
    });
    Barrier& b = engine.barriers.at(barrier);
    b.bytes -= copied.rows * 128;
    settle(b);
  });
}

inline void tensor_load(void* to, const CUtensorMap* map, uint64_t* barrier, int column, int residue, int step, int head, int batch, uint64_t) {
  tensor_load(to, map, barrier, column, residue, step, head, batch);
}
inline void tensor_load_all(
    void* to, const CUtensorMap* map, uint64_t* barrier, int column, int residue, int step, int head, int batch, uint64_t, int blocks) {
  for (int rank = 0; rank < blocks; ++rank)
    tensor_load(const_cast<uint8_t*>(decoding::of_block(static_cast<const uint8_t*>(to), rank)), map,
                const_cast<uint64_t*>(decoding::of_block(barrier, rank)), column, residue, step, head, batch);
}

inline void tensor_store(const CUtensorMap* map, const void* from, int column, int residue, int step, int head, int batch) {
  box(*map, shared_address(from), column, residue, step, head, batch, [](uint8_t* to, uint32_t place) {
    if (to) std::memcpy(to, shared_memory + place, 2);
  });
}

inline float widened(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float shared_element(uint32_t address) {
  uint16_t x;
  std::memcpy(&x, shared_memory + swizzled(address), 2);
  return widened(x);
}
inline uint32_t rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return std::isnan(x) ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
template <typename T>
uint32_t pack(float low, float high) {
  return rounded(low) | rounded(high) << 16;
}
inline float exp2_fast(float x) { return std::exp2(x); }

struct MatrixStore {
  uint32_t address, x[4];
};
inline void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  MatrixStore mine{address, {a, b, c, d}};
  host::together(mine, [](MatrixStore** l) {
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m) std::memcpy(shared_memory + l[8 * m + lane / 4]->address + lane % 4 * 4, &l[lane]->x[m], 4);
  });
}

inline uint64_t descriptor(uint32_t address, uint32_t leading) { return address | uint64_t{leading} << 32; }
inline uint64_t behind(uint64_t descriptor, int bytes) { return descriptor + bytes; }
inline uint32_t uniform(uint32_t x) {
  host::together(x, [](uint32_t** all) {
    for (int lane = 1; lane < 32; ++lane) *all[lane] = *all[0];
  });
  return x;
}

template <typename T>
struct IsHalf {
  static constexpr bool value = false;
};

struct Product {
  float* c;
  const uint32_t* a;
  uint64_t left, right;
  bool add;
};

// By the 128 threads of a warpgroup: c (+)= left[64, 16] right(column, k).
template <int kColumns, class Right>
void multiply(Product& mine, Right right) {
  const int group = host::current / 128;
  engine.brought[host::current] = &mine;
  host::meet(engine.warpgroups[group], 128, [&] {
    Product** const l = reinterpret_cast<Product**>(&engine.brought[128 * group]);
    static float a[64][16], b[kColumns][16];
    for (int row = 0; row < 64; ++row)
      for (int k = 0; k < 16; ++k) {
        if (mine.a) {
          const uint32_t pair = l[row / 16 * 32 + row % 8 * 4 + k % 8 / 2]->a[row % 16 / 8 + k / 8 * 2];
          a[row][k] = widened(static_cast<uint16_t>(k % 2 ? pair >> 16 : pair));
        } else {
          a[row][k] = shared_element(static_cast<uint32_t>(mine.left) + row / 8 * 1024 + row % 8 * 128 + 2 * k);
        }
      }
    for (int column = 0; column < kColumns; ++column)
      for (int k = 0; k < 16; ++k) b[column][k] = right(mine.right, column, k);
    for (int t = 0; t < 128; ++t)
      for (int i = 0; i < kColumns / 2; ++i) {
        const int row = t / 32 * 16 + i / 2 % 2 * 8 + t % 32 / 4, column = i / 4 * 8 + t % 4 * 2 + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
        l[t]->c[i] = l[t]->add ? l[t]->c[i] + sum : sum;
      }
  });
}

template <typename T, int kCount>
void product_shared(float (&c)[kCount], uint64_t a, uint64_t b, int add) {
  Product mine{c, nullptr, a, b, add != 0};
  multiply<2 * kCount>(mine, [](uint64_t right, int column, int k) {
    return shared_element(static_cast<uint32_t>(right) + column / 8 * 1024 + column % 8 * 128 + 2 * k);
  });
}

template <typename T, int kCount>
void product_registers(float (&c)[kCount], const uint32_t (&a)[4], uint64_t b, int add) {
  Product mine{c, a, 0, b, add != 0};
  multiply<2 * kCount>(mine, [](uint64_t right, int column, int k) {
    const uint32_t leading = right >> 32;
    return shared_element(static_cast<uint32_t>(right) + column / 64 * leading + k / 8 * 1024 + k % 8 * 128 + 2 * (column % 64));
  });
}

// Makes the state of a block of threads anew.
inline void new_block(int threads, int seed) {
  engine.barriers.clear(), engine.named.clear(), engine.copies.clear();
  engine.quads.assign(threads / 4, {}), engine.warpgroups.assign(threads / 128, {}), engine.brought.assign(threads, nullptr);
  engine.random.seed(seed);
}

}  // namespace sparse_attention::sm90

inline void __syncwarp(unsigned) { host::meet(sparse_attention::sm90::engine.quads[host::current / 4], 4, [] {}); }
