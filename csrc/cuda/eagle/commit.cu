// The accepted rows of all layers to the end of the committed ones, and their hidden states, in one launch. A thread moves one column of
// units of all of a head's rows: it reads them before it writes any, and no other thread touches them.
#include "rows.cuh"

namespace sparse_attention::eagle {
namespace {

constexpr int kThreads = 128;

// Where row `row` of request b begins in a head; -1 if its page is none.
__device__ __forceinline__ int64_t place_of(const Commit& in, int b, int64_t row) {
  if (!in.block_table) return b * in.strides.batch + row * in.strides.row;
  const int64_t page = in.block_table[int64_t{b} * in.blocks + row / in.page];
  return page >= 0 && page < in.pages ? page * in.strides.batch + row % in.page * in.strides.row : -1;
}

// Fills from and to [width] in shared memory. Returns how many rows request b commits: 0 if it is malformed.
__device__ int rows_to_move(const Commit& in, int b, int64_t* from, int64_t* to) {
  const int64_t start = in.lengths[b], last = in.accept_length[b];
  const bool fits = last >= 0 && last < in.width && start >= 0 && start <= in.rows - last - 1;
  const int count = fits ? int(last) + 1 : 0;
  bool good = true;
  for (int j = threadIdx.x; j < in.width; j += kThreads) {
    const int64_t index = in.accept_index[int64_t{b} * in.width + j];
    if (j >= count) continue;
    const bool inside = index >= 0 && index < in.rows - start && (in.nodes < 0 || index < in.nodes);
    from[j] = inside ? place_of(in, b, start + index) : -1;
    to[j] = place_of(in, b, start + j);
    good = good && from[j] >= 0 && to[j] >= 0;
  }
  return __syncthreads_and(good) ? count : 0;
}

template <class U>
__device__ void move_rows(const Commit& in, int b, int64_t item, int64_t items, const int64_t* from, const int64_t* to, int count) {
  const int column = int(item % in.units), head = int(item / in.units % in.heads);
  const int64_t layer = item / in.units / in.heads;
  char* data = in.cache[layer / in.layers] + layer % in.layers * in.strides.layer + head * in.strides.head;
  if (count <= Commit::kHeldRows) {
    U held[Commit::kHeldRows];
#pragma unroll
    for (int j = 0; j < Commit::kHeldRows; ++j)
      if (j < count) held[j] = *unit_at<U>(data, from[j], column);
#pragma unroll
    for (int j = 0; j < Commit::kHeldRows; ++j)
      if (j < count) *unit_at<U>(data, to[j], column) = held[j];
    return;
  }
  U* held = reinterpret_cast<U*>(in.scratch) + b * items + item;
  const int64_t step = in.batch * items;
  for (int j = 0; j < count; ++j) held[j * step] = *unit_at<U>(data, from[j], column);
  for (int j = 0; j < count; ++j) *unit_at<U>(data, to[j], column) = held[j * step];
}

template <class U>
__device__ void copy_hidden(const Commit& in, int b, int64_t at, int count) {
  const int64_t units = in.hidden_bytes / int64_t{sizeof(U)}, j = at / units, column = at % units;
  if (j >= in.width) return;
  U value{};
  if (j < count) value = *unit_at<U>(in.hidden, (b * in.nodes + in.accept_index[int64_t{b} * in.width + j]) * in.hidden_bytes, column);
  *unit_at<U>(in.hidden_out, (int64_t{b} * in.width + j) * in.hidden_bytes, column) = value;
}

template <class U>
__global__ void __launch_bounds__(kThreads, 4) commit_kernel(const __grid_constant__ Commit in, int moving, int blocks, bool wide) {
  int64_t *from = dynamic_shared<int64_t>(), *to = from + in.width;
  const int b = blockIdx.x / blocks, part = blockIdx.x % blocks;
  const int count = rows_to_move(in, b, from, to);
  if (part == 0 && threadIdx.x == 0 && in.lengths_out) in.lengths_out[b] = in.lengths[b] + count;
  if (part < moving) {
    int kept = 0;  // rows that are where they belong
    while (kept < count && from[kept] == to[kept]) ++kept;
    const int64_t item = int64_t{part} * kThreads + threadIdx.x, items = int64_t{in.caches} * in.layers * in.heads * in.units;
    if (kept < count && item < items) move_rows<U>(in, b, item, items, from + kept, to + kept, count - kept);
    return;
  }
  const int64_t at = int64_t{part - moving} * kThreads + threadIdx.x;
  if (wide)
    copy_hidden<uint4>(in, b, at, count);
  else
    copy_hidden<uint16_t>(in, b, at, count);
}

}  // namespace

int commit(const Commit& in, int unit, void* stream) {
  const int64_t moving = (int64_t{in.caches} * in.layers * in.heads * in.units + kThreads - 1) / kThreads;
  const bool wide = in.hidden_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(in.hidden) % 16 == 0 &&
                    reinterpret_cast<uintptr_t>(in.hidden_out) % 16 == 0;
  const int64_t copied = in.hidden_out ? in.width * (in.hidden_bytes / (wide ? 16 : 2)) : 0;
  const int64_t blocks = moving + (copied + kThreads - 1) / kThreads;
  return by_unit(unit, [&](auto* type) {
    return launch(commit_kernel<std::remove_pointer_t<decltype(type)>>, in.batch * blocks, kThreads, size_t(in.width) * 16, stream, in,
                  int(moving), int(blocks), wide);
  });
}

}  // namespace sparse_attention::eagle
