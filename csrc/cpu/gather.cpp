// Which instance of the gather engine runs; each is compiled in a file of its own.
#include "engines.h"
#include "simd.h"

namespace sparse_attention {

template <class T>
void gather_forward(const ForwardParams&, const RowsParams&);
template <class T>
void gather_backward(const BackwardParams&, const RowsParams&, const RowsParams&);

void gather_forward(Dtype dtype, const ForwardParams& p, const RowsParams& rows) {
  switch (dtype) {
    case Dtype::f32: return gather_forward<float>(p, rows);
    case Dtype::f64: return gather_forward<double>(p, rows);
    case Dtype::bf16: return gather_forward<BFloat16>(p, rows);
    case Dtype::f16: return gather_forward<Float16>(p, rows);
  }
}

void gather_backward(Dtype dtype, const BackwardParams& p, const RowsParams& by_query, const RowsParams& by_key) {
  switch (dtype) {
    case Dtype::f32: return gather_backward<float>(p, by_query, by_key);
    case Dtype::f64: return gather_backward<double>(p, by_query, by_key);
    case Dtype::bf16: return gather_backward<BFloat16>(p, by_query, by_key);
    case Dtype::f16: return gather_backward<Float16>(p, by_query, by_key);
  }
}

}  // namespace sparse_attention
