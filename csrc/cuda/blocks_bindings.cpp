// Between Python and the block masks that become layouts on the device.
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include <algorithm>

#include "bindings.h"
#include "blocks/blocks.h"
#include "tile_bindings.h"

namespace sparse_attention::bindings {
namespace {

// Heads whose keys and values, of 128 columns of two bytes, stay in an L2 cache together: one at least.
int section_of(int64_t kv_len) { return static_cast<int>(std::clamp<int64_t>((int64_t{32} << 20) / (512 * kv_len), 1, 4)); }

constexpr int kOutlier = 4;  // items so many times as long as the mean go first, whatever their head

// A block mask for one layout of one part. mask: bool [heads or 1, q_blocks, kv_blocks].
Filter filter(const Layout& layout, const Tensor& mask_in, int64_t block) {
  TORCH_CHECK(layout.parts.size() == 1, "a block mask filters a layout of one part, got ", layout.parts.size());
  TORCH_CHECK(block % 64 == 0 && block >= layout.keys && 2 * layout.keys >= block, "block is ", block, ", tiles have ", layout.keys, " keys");
  const auto blocks = [block](int64_t length) { return (length + block - 1) / block; };
  const int64_t heads = mask_in.dim() == 3 ? mask_in.size(0) : 0;
  TORCH_CHECK(mask_in.is_cuda() && mask_in.scalar_type() == at::kBool && (heads == 1 || heads == layout.heads) &&
                  mask_in.size(1) == blocks(layout.q_len) && mask_in.size(2) == blocks(layout.kv_len),
              "block_mask is a ", mask_in.scalar_type(), " tensor of shape ", mask_in.sizes(), " on ", mask_in.device(),
              ", expected bool [1 or ", layout.heads, ", ", blocks(layout.q_len), ", ", blocks(layout.kv_len), "] on a CUDA device");
  const c10::cuda::CUDAGuard guard(mask_in.device());
  const auto stream = at::cuda::getCurrentCUDAStream();
  const Tensor mask = mask_in.contiguous();
  const int64_t rows = 2 * ((layout.q_len + kTileQueries - 1) / kTileQueries), tiles = (layout.kv_len + layout.keys - 1) / layout.keys;
  const int64_t words = (tiles + 63) / 64;
  Filter made{at::empty({heads, rows, words}, mask.options().dtype(at::kLong))};
  made.used = at::empty({heads, rows / 2, (words + 63) / 64}, made.bits.options());
  blocks::Pack pack{};
  pack.mask = static_cast<const uint8_t*>(mask.data_ptr());
  pack.bits = reinterpret_cast<uint64_t*>(made.bits.data_ptr<int64_t>());
  pack.heads = heads, pack.q_blocks = mask.size(1), pack.kv_blocks = mask.size(2);
  pack.rows = rows, pack.words = words;
  pack.rows_a_block = block / 64, pack.tiles_a_block = block / layout.keys;
  C10_CUDA_CHECK(static_cast<cudaError_t>(blocks::pack(pack, stream)));
  const Part& part = layout.parts[0];
  Tables t = part.tables(1);
  made.apply(t, part);
  const Tensor lengths = at::empty({t.n_work}, mask.options().dtype(at::kInt));
  // Parts are for the kernels that share a tile's halves out: of the sm90 tier, tiles of 64 keys.
  const int64_t processors = layout.tier == 90 && layout.keys == 64 ? part.starts.numel() - 1 : 0;
  made.order = at::empty({blocks::most_pieces(t.n_work, processors)}, mask.options().dtype(at::kLong));
  made.n_order = at::empty({1}, lengths.options());
  made.slots = blocks::most_slots(t.n_work, processors);
  C10_CUDA_CHECK(static_cast<cudaError_t>(blocks::count(t, lengths.data_ptr<int32_t>(), reinterpret_cast<uint64_t*>(made.used.data_ptr<int64_t>()), stream)));
  C10_CUDA_CHECK(static_cast<cudaError_t>(
      blocks::sort(t, lengths.data_ptr<int32_t>(), reinterpret_cast<Piece*>(made.order.data_ptr<int64_t>()), made.n_order.data_ptr<int32_t>(),
                   layout.heads, section_of(layout.kv_len), kOutlier, processors, stream)));
  return made;
}

}  // namespace

void bind_blocks(pybind11::module_& m) { m.def("filter", &filter); }

}  // namespace sparse_attention::bindings
