// Between Python and the tile engine: checks, allocation, and the params.
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include <optional>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "blocks/blocks.h"
#include "tile.h"

namespace sparse_attention::bindings {
namespace {

using at::Tensor;

constexpr int kSection = 4;  // heads whose keys and values should stay in the L2 cache together
constexpr int kOutlier = 4;  // items so many times as long as the mean go first, whatever their head

const Tensor& table(const Tensor& x, at::ScalarType type, const char* name) {
  TORCH_CHECK(x.is_cuda() && x.scalar_type() == type && x.is_contiguous(), name, " must be a contiguous ", type, " CUDA tensor, got ",
              x.scalar_type(), " on ", x.device());
  return x;
}

// One launch: the items of work that are handed out together, see struct Tables.
struct Part {
  Part(int64_t stride, int64_t merge, bool has_dead, const Tensor& work, const Tensor& starts, const Tensor& row_start, const Tensor& runs,
       const Tensor& masks, const Tensor& dead, const Tensor& marks)
      : stride(stride), merge(static_cast<Merge>(merge)), has_dead(has_dead), work(table(work, at::kInt, "work")),
        starts(table(starts, at::kInt, "starts")), row_start(table(row_start, at::kInt, "row_start")), runs(table(runs, at::kInt, "runs")),
        masks(table(masks, at::kLong, "masks")), dead(table(dead, at::kLong, "dead")), marks(table(marks, at::kInt, "marks")) {
    TORCH_CHECK(work.dim() == 2 && work.size(1) == 12, "work has shape ", work.sizes(), ", expected [items, 12]");
    TORCH_CHECK(merge >= kAlone && merge <= kLastPart, "merge is ", merge, ", expected 0 to 3");
  }

  Tables tables(int64_t batch) const {
    Tables t{};
    t.work = reinterpret_cast<const Work*>(work.data_ptr<int32_t>());
    t.starts = starts.data_ptr<int32_t>();
    t.row_start = row_start.data_ptr<int32_t>();
    t.runs = reinterpret_cast<const Run*>(runs.data_ptr<int32_t>());
    t.masks = reinterpret_cast<const uint64_t*>(masks.data_ptr<int64_t>());
    t.dead = reinterpret_cast<const uint64_t*>(dead.data_ptr<int64_t>());
    t.n_work = work.size(0), t.batch = batch;
    return t;
  }

  int64_t stride;
  Merge merge;
  bool has_dead;
  Tensor work, starts, row_start, runs, masks, dead, marks;
};

// Which key tiles each 64 queries may see beside what the layout says, and the order of its items.
struct Filter {
  Tensor bits, order;

  void apply(Tables& t, const Part& part) const {
    t.bits = reinterpret_cast<const uint64_t*>(bits.data_ptr<int64_t>());
    t.bit_heads = bits.size(0), t.bit_rows = bits.size(1), t.bit_words = bits.size(2);
    t.marks = part.marks.data_ptr<int32_t>();
    t.bit_masks = part.marks.size(1) - 1;
    t.order = order.defined() ? order.data_ptr<int32_t>() : nullptr;
  }
};

// The launches of a layout. keys: of a tile. tier: 90 or 80. merges: whether some head has more than one part.
struct Layout {
  Layout(std::vector<Part> parts, int64_t heads, int64_t q_len, int64_t kv_len, int64_t keys, int64_t tier)
      : parts(std::move(parts)), heads(heads), q_len(q_len), kv_len(kv_len), keys(keys), tier(tier) {
    TORCH_CHECK(!this->parts.empty(), "a layout needs at least one part");
    for (const Part& part : this->parts) merges |= part.merge != kAlone;
  }
  std::vector<Part> parts;
  int64_t heads, q_len, kv_len, keys, tier;
  bool merges = false;
};

using Kernel = int (*)(const Forward&, void*);

Kernel kernel(int64_t tier, at::ScalarType type) {
#ifdef SPARSE_ATTENTION_SM90
  if (tier == 90) return type == at::kHalf ? sm90::forward_f16 : sm90::forward_bf16;
#endif
  TORCH_CHECK(tier == 80, "the library was compiled without a tier ", tier);
  return type == at::kHalf ? sm80::forward_f16 : sm80::forward_bf16;
}

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
  Filter made{at::empty({heads, rows, (tiles + 63) / 64}, mask.options().dtype(at::kLong)), Tensor()};
  blocks::Pack pack{};
  pack.mask = static_cast<const uint8_t*>(mask.data_ptr());
  pack.bits = reinterpret_cast<uint64_t*>(made.bits.data_ptr<int64_t>());
  pack.heads = heads, pack.q_blocks = mask.size(1), pack.kv_blocks = mask.size(2);
  pack.rows = rows, pack.words = made.bits.size(2);
  pack.rows_a_block = block / 64, pack.tiles_a_block = block / layout.keys;
  C10_CUDA_CHECK(static_cast<cudaError_t>(blocks::pack(pack, stream)));
  const Part& part = layout.parts[0];
  Tables t = part.tables(1);
  made.apply(t, part);
  const Tensor lengths = at::empty({t.n_work}, mask.options().dtype(at::kInt));
  made.order = at::empty_like(lengths);
  C10_CUDA_CHECK(static_cast<cudaError_t>(blocks::count(t, lengths.data_ptr<int32_t>(), stream)));
  C10_CUDA_CHECK(static_cast<cudaError_t>(
      blocks::sort(t, lengths.data_ptr<int32_t>(), made.order.data_ptr<int32_t>(), layout.heads, kSection, kOutlier, stream)));
  return made;
}

// What the tensor copy engine can read: aligned to 16 bytes in every direction, no dimension repeated.
Tensor copyable(const Tensor& x) {
  bool good = x.stride(3) == 1 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  for (int d = 0; d < 3; ++d) good &= x.size(d) == 1 || (x.stride(d) > 0 && x.stride(d) % 8 == 0);
  return good ? x : x.contiguous();
}

Strided strided(const Tensor& x) {
  const auto stride = [&](int d) { return x.size(d) == 1 ? int64_t{8} : x.stride(d); };
  return {x.data_ptr(), stride(0), stride(1), stride(2)};
}

void check_shapes(const Tensor& q, const Tensor& k, const Tensor& v, const Layout& of) {
  TORCH_CHECK(q.is_cuda() && (q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf),
              "q must be a bfloat16 or float16 CUDA tensor, got ", q.scalar_type(), " on ", q.device());
  TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type() && k.device() == q.device() && v.device() == q.device(),
              "k and v must have the dtype and device of q");
  TORCH_CHECK(q.dim() == 4 && q.size(1) == of.heads && q.size(2) == of.q_len, "q has shape ", q.sizes(), ", the layout is for ", of.heads,
              " heads and ", of.q_len, " queries");
  TORCH_CHECK(k.dim() == 4 && k.size(0) == q.size(0) && k.size(2) == of.kv_len && k.size(3) == q.size(3) && of.heads % k.size(1) == 0 &&
                  v.sizes() == k.sizes(),
              "k and v have shapes ", k.sizes(), " and ", v.sizes(), ", the layout is for ", of.kv_len, " keys");
  TORCH_CHECK(q.size(3) % 8 == 0 && q.size(3) <= 256, "head_dim is ", q.size(3), ", expected a multiple of 8 up to 256");
}

std::tuple<Tensor, Tensor> forward(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Layout& layout, double scale,
                                   const std::optional<Filter>& filter) {
  check_shapes(q_in, k_in, v_in, layout);
  TORCH_CHECK(scale > 0, "scale is ", scale, ", expected a positive number");
  const c10::cuda::CUDAGuard guard(q_in.device());
  const Tensor q = copyable(q_in), k = copyable(k_in), v = copyable(v_in);
  Tensor out = at::empty_like(q);
  if (!copyable(out).is_same(out)) out = at::empty(q.sizes(), q.options());
  const Tensor lse = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  const Tensor partial = layout.merges ? at::empty(q.sizes(), q.options().dtype(at::kFloat)) : Tensor();
  const auto stream = at::cuda::getCurrentCUDAStream();
  const Kernel run = kernel(layout.tier, q.scalar_type());
  for (const Part& part : layout.parts) {
    Forward f{strided(q), strided(k), strided(v), strided(out)};
    f.partial = partial.defined() ? partial.data_ptr<float>() : nullptr;
    f.lse = lse.data_ptr<float>();
    f.tables = part.tables(q.size(0));
    if (filter) filter->apply(f.tables, part);
    f.batch = q.size(0), f.heads = q.size(1), f.kv_heads = k.size(1);
    f.q_len = layout.q_len, f.kv_len = layout.kv_len, f.head_dim = q.size(3);
    f.stride = part.stride, f.keys = layout.keys;
    f.merge = part.merge;
    f.has_dead = part.has_dead;
    f.processors = part.starts.numel() - 1;
    f.scale = scale;
    C10_CUDA_CHECK(static_cast<cudaError_t>(run(f, stream)));
  }
  return {out, lse};
}

}  // namespace

void bind_tile(pybind11::module_& m) {
  pybind11::class_<Part>(m, "Part").def(pybind11::init<int64_t, int64_t, bool, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                       const Tensor&, const Tensor&, const Tensor&>());
  pybind11::class_<Layout>(m, "Layout").def(pybind11::init<std::vector<Part>, int64_t, int64_t, int64_t, int64_t, int64_t>());
  pybind11::class_<Filter>(m, "Filter").def_readonly("bits", &Filter::bits).def_readonly("order", &Filter::order);
  m.def("filter", &filter);
  m.def("sm80_resident_blocks", &sm80::resident_blocks);
  m.def("tile_forward", &forward, pybind11::arg("q"), pybind11::arg("k"), pybind11::arg("v"), pybind11::arg("layout"), pybind11::arg("scale"),
        pybind11::arg("filter") = std::nullopt);
}

}  // namespace sparse_attention::bindings
