#include "gather.h"

namespace sparse_attention {
template void gather_forward<double>(const ForwardParams&, const RowsParams&);
template void gather_backward<double>(const BackwardParams&, const RowsParams&, const RowsParams&);
}  // namespace sparse_attention
