// The tile engine's entry points: one compiled instance for each element type (tile_*.cpp).
#include "engines.h"
#include "simd.h"

namespace sparse_attention {

template <class T>
void tile_forward(const ForwardParams&, const LayoutParams&);
template <class T>
void tile_backward(const BackwardParams&, const LayoutParams&, const LayoutParams&);

void tile_forward(Dtype dtype, const ForwardParams& p, const LayoutParams& layout) {
  switch (dtype) {
    case Dtype::f32: return tile_forward<float>(p, layout);
    case Dtype::f64: return tile_forward<double>(p, layout);
    case Dtype::bf16: return tile_forward<BFloat16>(p, layout);
    case Dtype::f16: return tile_forward<Float16>(p, layout);
  }
}

void tile_backward(Dtype dtype, const BackwardParams& p, const LayoutParams& by_query, const LayoutParams& by_key) {
  switch (dtype) {
    case Dtype::f32: return tile_backward<float>(p, by_query, by_key);
    case Dtype::f64: return tile_backward<double>(p, by_query, by_key);
    case Dtype::bf16: return tile_backward<BFloat16>(p, by_query, by_key);
    case Dtype::f16: return tile_backward<Float16>(p, by_query, by_key);
  }
}

}  // namespace sparse_attention
