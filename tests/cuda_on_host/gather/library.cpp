// The gather engine on the host, for ctypes.
#include "gather.h"

using namespace sparse_attention::gather;

// type: 0 float32, 1 float64, 2 bfloat16, 3 float16. pointers: q k v out lse partial row_start columns head_variant pieces splits.
// strides: of q, k, v and out. sizes: pieces, splits, longest, together, apart, aligned, batch, heads, kv_heads, q_len, head_dim.
extern "C" __attribute__((visibility("default"))) int run(int type, void** pointers, const int64_t* strides, const int32_t* sizes, double scale) {
  Forward f{};
  Strided* tensors[4] = {&f.q, &f.k, &f.v, &f.out};
  for (int n = 0; n < 4; ++n) *tensors[n] = {pointers[n], strides[3 * n], strides[3 * n + 1], strides[3 * n + 2]};
  f.lse = pointers[4], f.partial = pointers[5];
  f.row_start = static_cast<const int64_t*>(pointers[6]);
  f.columns = static_cast<const int32_t*>(pointers[7]), f.head_variant = static_cast<const int32_t*>(pointers[8]);
  f.pieces = static_cast<const Piece*>(pointers[9]), f.splits = static_cast<const Split*>(pointers[10]);
  f.n_pieces = sizes[0], f.n_splits = sizes[1], f.longest = sizes[2], f.together = sizes[3], f.apart = sizes[4], f.aligned = sizes[5];
  f.batch = sizes[6], f.heads = sizes[7], f.kv_heads = sizes[8], f.q_len = sizes[9], f.head_dim = sizes[10];
  f.scale = scale;
  using Engine = int (*)(const Forward&, void*);
  constexpr Engine engines[] = {forward_f32, forward_f64, forward_bf16, forward_f16};
  return engines[type](f, nullptr);
}
