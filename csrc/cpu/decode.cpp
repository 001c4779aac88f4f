// Which instance of the decode engine runs; each is compiled in a file of its own.
#include "decode.h"
#include "simd.h"

namespace sparse_attention {

template <class T>
void decode_forward(const DecodeParams&);

void decode_forward(Dtype dtype, const DecodeParams& p) {
  switch (dtype) {
    case Dtype::f32: return decode_forward<float>(p);
    case Dtype::f64: return decode_forward<double>(p);
    case Dtype::bf16: return decode_forward<BFloat16>(p);
    case Dtype::f16: return decode_forward<Float16>(p);
  }
}

}  // namespace sparse_attention
