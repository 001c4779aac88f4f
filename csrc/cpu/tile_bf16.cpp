#include "tile_backward.h"

namespace sparse_attention {
template void tile_forward<BFloat16>(const ForwardParams&, const LayoutParams&);
template void tile_backward<BFloat16>(const BackwardParams&, const LayoutParams&, const LayoutParams&);
}  // namespace sparse_attention
