// The kernel of the sm80 tier as a function of a host library, for tests/test_cuda_on_host.py, which knows the order of the arguments.
#include "sm80/forward.cuh"

using namespace sparse_attention;
using namespace sparse_attention::sm80;

template <class S>
void run_all(const Params& p, int blocks, int seed) {
  const size_t bytes = (sizeof(Shared<S>) + 127) / 128 * 128;
  const std::unique_ptr<uint8_t, void (*)(void*)> memory(static_cast<uint8_t*>(std::aligned_alloc(128, bytes)), std::free);
  shared_memory = memory.get();
  std::mt19937 random(seed);
  gridDim.x = blocks;
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    std::memset(shared_memory, 0xFF, bytes);
    host::run_block(S::kThreads, random, [&] { Consumer<S, __nv_bfloat16>(p, *reinterpret_cast<Shared<S>*>(shared_memory)).run(); });
  }
}

extern "C" __attribute__((visibility("default"))) int run(void** pointers, const int64_t* strides, const int32_t* sizes, float scale, int blocks, int barriers, int seed) {
  Params p{};
  Strided* tensors[4] = {&p.q, &p.k, &p.v, &p.out};
  for (int i = 0; i < 4; ++i) *tensors[i] = {pointers[i], 2 * strides[3 * i], 2 * strides[3 * i + 1], 2 * strides[3 * i + 2]};
  p.partial = static_cast<float*>(pointers[4]), p.lse = static_cast<float*>(pointers[5]);
  Tables& t = p.tables;
  t.work = static_cast<const Work*>(pointers[6]), t.starts = static_cast<const int32_t*>(pointers[7]);
  t.runs = static_cast<const Run*>(pointers[8]);
  t.masks = static_cast<const uint64_t*>(pointers[9]), t.dead = static_cast<const uint64_t*>(pointers[10]);
  t.marks = static_cast<const int32_t*>(pointers[11]);
  t.bits = static_cast<const uint64_t*>(pointers[12]), t.order = static_cast<const Piece*>(pointers[13]);
  const int32_t n_order = sizes[13];
  t.n_order = &n_order;
  t.n_work = sizes[0], t.batch = sizes[1], p.heads = sizes[2], p.group = sizes[2] / sizes[3], p.q_len = sizes[4], p.kv_len = sizes[5];
  p.head_dim = sizes[6], p.keys = sizes[7], p.merge = static_cast<Merge>(sizes[8]);
  const std::vector<uint64_t> used = host::used_words(t.bits, sizes[9] * sizes[10] / 2, sizes[11]);
  int32_t ticket = 0;
  t.used = used.data(), t.ticket = &ticket;
  t.bit_heads = sizes[9], t.bit_rows = sizes[10], t.bit_words = sizes[11], t.bit_masks = sizes[12];
  p.scale_log2 = scale * 1.4426950408889634f;
  host::block.barriers = barriers;
  try {
    if (p.head_dim <= 64) run_all<Shape<64, 64, 2, 3>>(p, blocks, seed);
    else if (p.head_dim <= 128) run_all<Shape<128, 32, 2, 2>>(p, blocks, seed);
    else run_all<Shape<256, 32, 1, 1>>(p, blocks, seed);
  } catch (const std::runtime_error&) {
    return 1;
  }
  return 0;
}
