#include "gather.h"

namespace sparse_attention {
template void gather_forward<float>(const ForwardParams&, const RowsParams&);
template void gather_backward<float>(const BackwardParams&, const RowsParams&, const RowsParams&);
}  // namespace sparse_attention
