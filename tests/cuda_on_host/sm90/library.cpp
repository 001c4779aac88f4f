// The kernels of the sm90 tier as functions of a host library, for tests/test_cuda_sm90_on_host.py, which knows the order of the arguments.
#include "sm90/decode.cuh"
#include "sm90/forward.cuh"
#include "join.h"

using namespace sparse_attention;
using namespace sparse_attention::sm90;

namespace {

// As maps.cuh has it: boxes of the sequences with floor(length / stride) steps, or of those with one more.
CUtensorMap map_of(const Strided& x, int head_dim, int heads, int batch, int length, int stride, bool longer, int rows) {
  const int residues = longer ? length % stride : stride, steps = length / stride + longer;
  return {static_cast<uint8_t*>(x.data), {head_dim, residues, steps, heads, batch}, {1, x.row, x.row * stride, x.head, x.batch}, rows};
}

// As decode_launch.cuh has it: boxes of rows that are query by query.
CUtensorMap rows_of(const Strided& x, const Decode& d, int rows) {
  return {static_cast<uint8_t*>(x.data), {d.head_dim, d.group, d.q_len, d.kv_heads, d.batch}, {1, x.head, x.row, x.head * d.group, x.batch}, rows, d.group};
}

// Runs `body(shared)` in every thread of one block, or of a cluster of them, whose shared memory begins as NaN.
template <class Memory, class Body>
void run_block(int threads, int seed, Body body, int blocks = 1) {
  const std::unique_ptr<uint8_t, void (*)(void*)> memory(static_cast<uint8_t*>(std::aligned_alloc(1024, blocks * sizeof(Memory))), std::free);
  sm80::shared_memory = shared_memory = memory.get(), decoding::shared_bytes = sizeof(Memory);
  std::memset(shared_memory, 0xFF, blocks * sizeof(Memory));
  new_block(threads * blocks, seed);
  std::mt19937 random(seed);
  host::run_block(threads, random, [&] { body(reinterpret_cast<Memory*>(shared_memory)[host::current / threads]); }, blocks);
  if (!engine.copies.empty()) throw std::runtime_error("a copy was never waited for");
  for (const auto& [id, at] : engine.named)
    if (at.arrived) throw std::runtime_error("an arrival is left at a named barrier");
}

template <class S>
void decode_all(const Decode& d, int seed) {
  const int tiles = (d.group * d.q_len + S::kQueries - 1) / S::kQueries, box = std::min(S::kKeys, d.block_table ? d.page : S::kKeys);
  const CacheMaps maps{map_of(d.k, d.head_dim, d.kv_heads, d.pages, d.page, 1, false, box),
                       map_of(d.v, d.head_dim, d.kv_heads, d.pages, d.page, 1, false, box), rows_of(d.q, d, S::kQueries), rows_of(d.out, d, 16), 16 % d.group == 0};
  const int blocks = d.cluster * S::kMates;
  for (uint32_t x = 0; x < uint32_t(d.splits * S::kMates); x += blocks)
    for (uint32_t y = 0; y < uint32_t(d.kv_heads * tiles / S::kMates); ++y)
      for (uint32_t batch = 0; batch < uint32_t(d.batch); ++batch) {
        blockIdx = {x, y, batch};
        run_block<Shared<S>>(S::kThreads, seed++, [&](Shared<S>& shared) { run_block<S, __nv_bfloat16>(d, maps, shared); }, blocks);
      }
  if (d.splits > d.cluster) join_all<__nv_bfloat16>(d, seed);
}

template <class S, Merge kMerge, bool kBury, bool kHalves = false>
void forward_all(const Params& p, const Maps& maps, int blocks, int seed) {
  gridDim.x = blocks;
  for (uint32_t block = 0; block < uint32_t(blocks); ++block) {
    blockIdx = {block};
    run_block<Memory<S>>(S::kThreads, seed++, [&](Memory<S>& shared) {
      if (threadIdx.x == 0) shared.agenda.init(), init_barriers(shared, 1, kHalves ? kWarpsThatSay : 2);
      __syncthreads();
      if (threadIdx.x >= 128) return Consumer<S, __nv_bfloat16, kMerge, kBury, kHalves>(p, maps, shared).run();
      if (threadIdx.x == 0) kHalves ? produce<S>(p, maps, shared, Read(shared.agenda)) : produce<S>(p, maps, shared, Found(p.tables));
      if (kHalves && threadIdx.x / 32 == 1) Write(shared.agenda, p.tables).run();
    });
  }
}

template <class S, bool kBury>
void forward_merge(Merge merge, const Params& p, const Maps& maps, int blocks, int seed) {
  if constexpr (S::kKeys == 64 && S::kDim <= 128)
    if (merge == kAlone && p.tables.bits) return forward_all<S, kAlone, kBury, true>(p, maps, blocks, seed);
  switch (merge) {
    case kAlone: return forward_all<S, kAlone, kBury>(p, maps, blocks, seed);
    case kFirstPart: return forward_all<S, kFirstPart, kBury>(p, maps, blocks, seed);
    case kMiddlePart: return forward_all<S, kMiddlePart, kBury>(p, maps, blocks, seed);
    default: return forward_all<S, kLastPart, kBury>(p, maps, blocks, seed);
  }
}

template <class F>
int guarded(F run) {
  try {
    run();
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int decode(void** pointers, const int64_t* strides, const int32_t* sizes, float scale, int rows, int seed) {
  const Decode d = decode_of(pointers, strides, sizes, scale);
  return guarded([&] {
    using Small = CacheShape<64, 128, 64, 3, 80>;
    using Long = CacheShape<128, 128, 128, 3, 320>;
    if (rows == 256) decode_all<CacheShape<128, 128, 128, 3, 320, 2>>(d, seed);
    else if (rows == 64 && d.head_dim <= 64) decode_all<CacheShape<64, 64, 64, 5, 1088>>(d, seed);
    else if (rows == 64) has_room<Small>(d) ? decode_all<Small>(d, seed) : decode_all<CacheShape<64, 128, 64, 4, 1088>>(d, seed);
    else if (d.head_dim <= 64) decode_all<CacheShape<128, 64, 128, 4, 2176>>(d, seed);
    else has_room<Long>(d) ? decode_all<Long>(d, seed) : decode_all<CacheShape<128, 128, 128, 2, 2176>>(d, seed);
  });
}

extern "C" __attribute__((visibility("default"))) int forward(void** pointers, const int64_t* strides, const int32_t* sizes, float scale, int blocks, int seed) {
  Strided q, k, v, out, *tensors[4] = {&q, &k, &v, &out};
  for (int i = 0; i < 4; ++i) *tensors[i] = {pointers[i], strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]};
  Params p{};
  p.partial = static_cast<float*>(pointers[4]), p.lse = static_cast<float*>(pointers[5]);
  Tables& t = p.tables;
  t.work = static_cast<const Work*>(pointers[6]), t.starts = static_cast<const int32_t*>(pointers[7]);
  t.runs = static_cast<const Run*>(pointers[8]);
  t.masks = static_cast<const uint64_t*>(pointers[9]), t.dead = static_cast<const uint64_t*>(pointers[10]);
  t.marks = static_cast<const int32_t*>(pointers[11]);
  t.bits = static_cast<const uint64_t*>(pointers[12]), t.order = static_cast<const Piece*>(pointers[13]);
  const int32_t n_order = sizes[15];
  t.n_order = &n_order;
  t.n_work = sizes[0], t.batch = sizes[1], p.heads = sizes[2], p.group = sizes[2] / sizes[3], p.q_len = sizes[4];
  const int kv_len = sizes[5], keys = sizes[7], stride = sizes[13];
  const Merge merge = static_cast<Merge>(sizes[8]);
  p.head_dim = sizes[6];
  const std::vector<uint64_t> used = host::used_words(t.bits, sizes[9] * sizes[10] / 2, sizes[11]);
  int32_t ticket = 0;
  t.used = used.data(), t.ticket = &ticket;
  t.bit_heads = sizes[9], t.bit_rows = sizes[10], t.bit_words = sizes[11], t.bit_masks = sizes[12];
  const bool has_dead = sizes[14];
  p.scale_log2 = scale * 1.4426950408889634f;
  p.cuts.slots = sizes[16], t.cuts = sizes[16] > 0;
  const size_t rows = size_t(t.batch) * p.cuts.slots * kTileQueries;
  std::vector<float> cut_out(rows * p.head_dim, NAN), cut_lse(rows, NAN);
  std::vector<uint32_t> arrived(2 * size_t(t.batch) * p.cuts.slots);
  p.cuts.out = cut_out.data(), p.cuts.lse = cut_lse.data(), p.cuts.arrived = arrived.data();
  Maps maps{};
  for (const bool longer : {false, true}) {
    maps.q[longer] = map_of(q, p.head_dim, p.heads, t.batch, p.q_len, stride, longer, kTileQueries);
    maps.out[longer] = map_of(out, p.head_dim, p.heads, t.batch, p.q_len, stride, longer, kTileQueries / 2);
    maps.k[longer] = map_of(k, p.head_dim, sizes[3], t.batch, kv_len, stride, longer, keys);
    maps.v[longer] = map_of(v, p.head_dim, sizes[3], t.batch, kv_len, stride, longer, keys);
  }
  return guarded([&] {
    const auto all = [&]<class S>(S) {
      has_dead ? forward_merge<S, true>(merge, p, maps, blocks, seed) : forward_merge<S, false>(merge, p, maps, blocks, seed);
    };
    if (keys == 128) p.head_dim <= 64 ? all(Shape<64, 128, 4>{}) : all(Shape<128, 128, 2>{});
    else if (p.head_dim <= 64) all(Shape<64, 64, 4>{});
    else if (p.head_dim <= 128) all(Shape<128, 64, 5>{});
    else all(Shape<256, 64, 2>{});
  });
}
