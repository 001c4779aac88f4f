#include "decode_forward.h"

namespace sparse_attention {
template void decode_forward<double>(const DecodeParams&);
}  // namespace sparse_attention
