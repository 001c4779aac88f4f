// Rows of a cache: appended, and retrieved by their indices. A thread moves one unit.
#include "rows.cuh"

namespace sparse_attention::eagle {
namespace {

constexpr int kThreads = 256;

// Unit `column` of row `row` of head `head`, of keys (0) or values (1) of request b. False behind the last.
struct Place {
  int which, b, head, row, column;
  __device__ bool find(int batch, int heads, int count, int units, int blocks) {
    const int pair = blockIdx.x / blocks;
    unsigned at = unsigned(blockIdx.x % blocks) * kThreads + threadIdx.x;
    which = pair / batch, b = pair % batch;
    column = at % units, at /= units;
    row = at % count, head = at / count;
    return head < heads;
  }
};

int64_t blocks_of(int heads, int count, int units) { return (int64_t{heads} * count * units + kThreads - 1) / kThreads; }

template <class U>
__global__ void __launch_bounds__(kThreads) append_kernel(Append in, int blocks) {
  Place at;
  const bool inside = at.find(in.batch, in.heads, in.count, in.units, blocks);
  const int64_t length = in.lengths[at.b];
  const bool fits = length >= 0 && length <= in.rows - in.count;
  if (at.which == 0 && blockIdx.x % blocks == 0 && threadIdx.x == 0) in.lengths_out[at.b] = fits ? length + in.count : length;
  if (!inside || !fits) return;
  const auto pick = [&](const auto (&both)[2]) { return at.which ? both[1] : both[0]; };
  const Strides to = pick(in.cache_strides), from = pick(in.fresh_strides);
  *unit_at<U>(pick(in.cache), at.b * to.batch + at.head * to.head + (length + at.row) * to.row, at.column) =
      *unit_at<U>(pick(in.fresh), at.b * from.batch + at.head * from.head + at.row * from.row, at.column);
}

template <class U>
__global__ void __launch_bounds__(kThreads) retrieve_kernel(Retrieve in, int blocks) {
  Place at;
  if (!at.find(in.batch, in.heads, in.count, in.units, blocks)) return;
  const auto pick = [&](const auto (&both)[2]) { return at.which ? both[1] : both[0]; };
  const int64_t row = in.indices[int64_t{at.b} * in.count + at.row];
  const Strides from = pick(in.strides);
  U value{};
  if (row >= 0 && row < in.rows) value = *unit_at<U>(pick(in.cache), at.b * from.batch + at.head * from.head + row * from.row, at.column);
  const int64_t out_row = (int64_t{at.b} * in.heads + at.head) * in.count + at.row;
  *unit_at<U>(pick(in.out), out_row * in.units * int64_t{sizeof(U)}, at.column) = value;
}

}  // namespace

int append(const Append& in, int unit, void* stream) {
  const int64_t blocks = blocks_of(in.heads, in.count, in.units);
  return by_unit(unit, [&](auto* type) {
    return launch(append_kernel<std::remove_pointer_t<decltype(type)>>, 2 * in.batch * blocks, kThreads, 0, stream, in, int(blocks));
  });
}

int retrieve(const Retrieve& in, int unit, void* stream) {
  const int64_t blocks = blocks_of(in.heads, in.count, in.units);
  return by_unit(unit, [&](auto* type) {
    return launch(retrieve_kernel<std::remove_pointer_t<decltype(type)>>, 2 * in.batch * blocks, kThreads, 0, stream, in, int(blocks));
  });
}

}  // namespace sparse_attention::eagle
