#include "decode_forward.h"

namespace sparse_attention {
template void decode_forward<Float16>(const DecodeParams&);
}  // namespace sparse_attention
