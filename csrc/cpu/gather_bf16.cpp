#include "gather.h"

namespace sparse_attention {
template void gather_forward<BFloat16>(const ForwardParams&, const RowsParams&);
template void gather_backward<BFloat16>(const BackwardParams&, const RowsParams&, const RowsParams&);
}  // namespace sparse_attention
