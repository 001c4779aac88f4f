#include "gather.h"

namespace sparse_attention {
template void gather_forward<Float16>(const ForwardParams&, const RowsParams&);
template void gather_backward<Float16>(const BackwardParams&, const RowsParams&, const RowsParams&);
}  // namespace sparse_attention
