#include <cuda_runtime.h>

#include <climits>

#include "../walk.cuh"
#include "blocks.h"

namespace sparse_attention::blocks {
namespace {

// 16 bytes that are 0 or 1 -> 16 bits.
__device__ __forceinline__ uint32_t squeeze(uint4 bytes) {
  const auto four = [](uint32_t x) { return x * 0x01020408u >> 24 & 0xF; };
  return four(bytes.x) | four(bytes.y) << 4 | four(bytes.z) << 8 | four(bytes.w) << 12;
}

// Every bit of x twice: bit b becomes bits 2 b and 2 b + 1.
__device__ __forceinline__ uint64_t twice(uint32_t x) {
  uint64_t wide = x;
  wide = (wide | wide << 16) & 0x0000FFFF0000FFFFull;
  wide = (wide | wide << 8) & 0x00FF00FF00FF00FFull;
  wide = (wide | wide << 4) & 0x0F0F0F0F0F0F0F0Full;
  wide = (wide | wide << 2) & 0x3333333333333333ull;
  wide = (wide | wide << 1) & 0x5555555555555555ull;
  return wide | wide << 1;
}

// A thread makes one word of one block row.
__global__ void pack_kernel(const Pack p) {
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int word = index % p.words;
  const int64_t row = index / p.words;  // of all heads
  if (row >= int64_t{p.heads} * p.q_blocks) return;
  const int count = 64 / p.tiles_a_block, first = word * count, stop = min(count, p.kv_blocks - first);
  const uint8_t* from = p.mask + row * p.kv_blocks + first;
  uint64_t found = 0;
  if (stop == count && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    for (int n = 0; n < count; n += 16) found |= uint64_t{squeeze(__ldcs(reinterpret_cast<const uint4*>(from + n)))} << n;
  } else {
    for (int n = 0; n < stop; ++n) found |= uint64_t{from[n] != 0} << n;
  }
  if (p.tiles_a_block == 2) found = twice(static_cast<uint32_t>(found));
  const int64_t head = row / p.q_blocks;
  for (int r = 0; r < p.rows_a_block; ++r) {
    const int64_t at = (row - head * p.q_blocks) * p.rows_a_block + r;
    if (at < p.rows) p.bits[(head * p.rows + at) * p.words + word] = found;
  }
  if (row % p.q_blocks == p.q_blocks - 1)
    for (int at = p.q_blocks * p.rows_a_block; at < p.rows; ++at) p.bits[(head * p.rows + at) * p.words + word] = 0;
}

// Set bits first to first + count - 1 of either row.
__device__ __forceinline__ int set_bits(const uint64_t* upper, const uint64_t* lower, int first, int count) {
  int found = 0;
  for (int at = first, end = first + count; at < end;) {
    const int shift = at % 64, take = min(64 - shift, end - at);
    const uint64_t both = (upper[at / 64] | lower[at / 64]) >> shift;
    found += __popcll(take == 64 ? both : both & ((uint64_t{1} << take) - 1));
    at += take;
  }
  return found;
}

__global__ void count_kernel(const Tables t, int32_t* lengths, uint64_t* used) {
  const int n = blockIdx.x * blockDim.x + threadIdx.x;
  if (n >= t.n_work) return;
  const Work w = t.work[n];
  const int64_t tile = int64_t{w.head % t.bit_heads} * (t.bit_rows / 2) + w.tile;
  const uint64_t* upper = t.bits + tile * 2 * t.bit_words;
  bool same = true;
  for (int first = 0; first < t.bit_words; first += 64) {
    uint64_t found = 0;
    for (int word = first; word < min(first + 64, t.bit_words); ++word) {
      found |= uint64_t{(upper[word] | upper[t.bit_words + word]) != 0} << (word - first);
      same &= upper[word] == upper[t.bit_words + word];
    }
    used[tile * ((t.bit_words + 63) / 64) + first / 64] = found;  // heads with one mask write the same
  }
  int length = 0;
  for (int r = w.first_run; r < w.end_run; ++r)
    length += set_bits(upper, upper + t.bit_words, t.runs[r].first, t.runs[r].count);
  lengths[n] = 2 * length + same;
}

constexpr int kLeastPart = 16, kLeastOfMany = 64;  // tiles of a part; where there are more items than processors

// Which items are cut: those over twice the mean, or, where there are fewer items than processors, over one and a half times what each
// processor would have if all had alike.
struct Cutting {
  int least, share;  // tiles of the items that are not cut, at most; of a part, if all are spread evenly

  __device__ void begin(float mean, int items, int processors) {
    const float fair = mean * items / max(1, processors);
    const bool many = items > processors;
    share = processors ? max(many ? kLeastOfMany : kLeastPart, static_cast<int>(ceilf(many ? fair / 4 : fair))) : INT_MAX;
    least = max(share, static_cast<int>(many ? 2 * mean : 1.5f * fair));
  }
  __device__ int parts(int tiles) const { return tiles > least ? min(kMostParts, (tiles + share - 1) / share) : 1; }
};

constexpr int kThreads = 1024, kGrades = 8, kPlaces = 8, kLongGrades = 256, kMostSections = 128;

__device__ float block_sum(float x, float* scratch) {  // scratch: [33]; the same answer for all threads
  for (int d = 16; d; d /= 2) x += __shfl_xor_sync(~0u, x, d);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x < 32) {
    float y = scratch[threadIdx.x];
    for (int d = 16; d; d /= 2) y += __shfl_xor_sync(~0u, y, d);
    if (threadIdx.x == 0) scratch[32] = y;
  }
  __syncthreads();
  return scratch[32];
}

// One block counts the items of each grade, then places them: outliers by length, then section by section by length, roughly, and those of
// about one length by their place in the sequence, so that what runs at the same time reads neighbouring keys. Where two items are of one
// grade, their order is left to chance: it decides when they run, not what they give. lengths: twice the tiles, and 1 for kSame. Long
// items are cut into parts, which count as outliers.
__global__ void __launch_bounds__(kThreads)
    sort_kernel(const Tables t, const int32_t* lengths, Piece* order, int32_t* n_order, int sections, int section, int outlier, int processors) {
  extern __shared__ int places[];
  __shared__ int slots;
  __shared__ Cutting cutting;
  __shared__ int scratch[32];
  __shared__ float sums[33];
  const int grades = kLongGrades + sections * kGrades * kPlaces;
  for (int g = threadIdx.x; g < grades; g += kThreads) places[g] = 0;
  float sum = 0;  // of all tiles there may be more than an int counts
  int most = 1;
  for (int n = threadIdx.x; n < t.n_work; n += kThreads) sum += lengths[n] / 2, most = max(most, lengths[n] / 2);
  const float mean = block_sum(sum, sums) / t.n_work;
  for (int d = 16; d; d /= 2) most = max(most, __shfl_xor_sync(~0u, most, d));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = most;
  if (threadIdx.x == 0) cutting.begin(mean, t.n_work, processors), slots = 0;
  __syncthreads();
  for (int w = 0; w < 32; ++w) most = max(most, scratch[w]);
  const float bound = fmaxf(outlier * mean, 1.0f);
  const auto grade = [&](int n) {
    const int parts = cutting.parts(lengths[n] / 2), length = lengths[n] / 2 / parts;
    if (parts > 1 || length > bound) return min(kLongGrades - 1, static_cast<int>((most - length) / max(1.0f, most - bound) * kLongGrades));
    const Work& w = t.work[n];
    const int step = min(kGrades - 1, static_cast<int>((bound - length) / bound * kGrades)), place = int64_t{w.tile} * kPlaces / max(1, t.bit_rows / 2);
    return kLongGrades + (w.head / section % sections * kGrades + step) * kPlaces + min(kPlaces - 1, place);
  };
  __syncthreads();
  for (int n = threadIdx.x; n < t.n_work; n += kThreads) atomicAdd(&places[grade(n)], cutting.parts(lengths[n] / 2));
  __syncthreads();
  int before = 0;  // of this round of 1024 grades
  for (int base = 0; base < grades; base += kThreads) {
    const int g = base + threadIdx.x, mine = g < grades ? places[g] : 0;
    int inclusive = mine;
    for (int d = 1; d < 32; d *= 2) {
      const int left = __shfl_up_sync(~0u, inclusive, d);
      if (threadIdx.x % 32 >= d) inclusive += left;
    }
    if (threadIdx.x % 32 == 31) scratch[threadIdx.x / 32] = inclusive;
    __syncthreads();
    int warps = 0, all = 0;
    for (int w = 0; w < 32; ++w) {
      if (w < threadIdx.x / 32) warps += scratch[w];
      all += scratch[w];
    }
    if (g < grades) places[g] = before + warps + inclusive - mine;
    before += all;
    __syncthreads();
  }
  if (threadIdx.x == 0) *n_order = before;
  for (int n = threadIdx.x; n < t.n_work; n += kThreads) {
    const int parts = cutting.parts(lengths[n] / 2), slot = parts > 1 ? atomicAdd(&slots, parts) : 0, at = atomicAdd(&places[grade(n)], parts);
    for (int part = 0; part < parts; ++part)
      order[at + part] = {n | (lengths[n] & 1 ? kSame : 0), parts > 1 ? (slot * kMostParts + part) * kMostParts + parts - 1 : -1};
  }
}

}  // namespace

int pack(const Pack& p, void* stream) {
  const int64_t threads = int64_t{p.heads} * p.q_blocks * p.words;
  pack_kernel<<<static_cast<unsigned>((threads + 255) / 256), 256, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

int count(const Tables& t, int32_t* lengths, uint64_t* used, void* stream) {
  count_kernel<<<(t.n_work + 127) / 128, 128, 0, static_cast<cudaStream_t>(stream)>>>(t, lengths, used);
  return cudaGetLastError();
}

int sort(const Tables& t, const int32_t* lengths, Piece* order, int32_t* n_order, int heads, int section, int outlier, int processors, void* stream) {
  const int sections = min(kMostSections, (heads + section - 1) / section);
  const int bytes = (kLongGrades + sections * kGrades * kPlaces) * sizeof(int);
  sort_kernel<<<1, kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(t, lengths, order, n_order, sections, section, outlier, processors);
  return cudaGetLastError();
}

}  // namespace sparse_attention::blocks
