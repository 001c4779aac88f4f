#include "tile_backward.h"

namespace sparse_attention {
template void tile_forward<double>(const ForwardParams&, const LayoutParams&);
template void tile_backward<double>(const BackwardParams&, const LayoutParams&, const LayoutParams&);
}  // namespace sparse_attention
