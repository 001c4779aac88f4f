// Between Python and the tile engine: checks, allocation, and the params.
#include "tile_bindings.h"

#include <ATen/ExpandUtils.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/EmptyTensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include <tuple>

#include "bindings.h"
#include "scratch_bindings.h"

namespace sparse_attention::bindings {
namespace {

const Tensor& table(const Tensor& x, at::ScalarType type, const char* name) {
  TORCH_CHECK(x.is_cuda() && x.scalar_type() == type && x.is_contiguous(), name, " must be a contiguous ", type, " CUDA tensor, got ",
              x.scalar_type(), " on ", x.device());
  return x;
}

using Kernel = int (*)(const Forward&, void*);

Kernel kernel(int64_t tier, at::ScalarType type) {
#ifdef SPARSE_ATTENTION_SM90
  if (tier == 90) return type == at::kHalf ? sm90::forward_f16 : sm90::forward_bf16;
#endif
  TORCH_CHECK(tier == 80, "the library was compiled without a tier ", tier);
  return type == at::kHalf ? sm80::forward_f16 : sm80::forward_bf16;
}

// What the tensor copy engine can read: aligned to 16 bytes in every direction, no dimension repeated.
Tensor copyable(const Tensor& x) {
  bool good = x.stride(3) == 1 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  for (int d = 0; d < 3; ++d) good &= x.size(d) == 1 || (x.stride(d) > 0 && x.stride(d) % 8 == 0);
  return good ? x : x.clone(at::MemoryFormat::Contiguous);
}

Strided strided(const Tensor& x) {
  const auto stride = [&](int d) { return x.size(d) == 1 ? int64_t{8} : x.stride(d); };
  return {x.data_ptr(), stride(0), stride(1), stride(2)};
}

// As empty_like, in q's order of dimensions; without the dispatcher, which costs a microsecond.
Tensor output_like(const Tensor& q) {
  const auto like = [&](at::IntArrayRef strides) {
    return Tensor(at::detail::empty_strided_cuda(q.sizes(), strides, q.scalar_type(), q.device()));
  };
  const Tensor out = q.is_non_overlapping_and_dense() ? like(q.strides()) : like(at::infer_dense_strides(q.sizes(), q.strides()));
  if (copyable(out).is_same(out)) return out;
  return Tensor(at::detail::empty_cuda(q.sizes(), q.scalar_type(), q.device(), at::MemoryFormat::Contiguous));
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

}  // namespace

Part::Part(int64_t stride, int64_t merge, bool has_dead, const Tensor& work, const Tensor& starts, const Tensor& runs, const Tensor& masks,
           const Tensor& dead, const Tensor& marks)
    : stride(stride), merge(static_cast<Merge>(merge)), has_dead(has_dead), work(table(work, at::kInt, "work")),
      starts(table(starts, at::kInt, "starts")), runs(table(runs, at::kInt, "runs")),
      masks(table(masks, at::kLong, "masks")), dead(table(dead, at::kLong, "dead")), marks(table(marks, at::kInt, "marks")) {
  TORCH_CHECK(work.dim() == 2 && work.size(1) == 16, "work has shape ", work.sizes(), ", expected [items, 16]");
  TORCH_CHECK(merge >= kAlone && merge <= kLastPart, "merge is ", merge, ", expected 0 to 3");
}

Tables Part::tables(int64_t batch) const {
  Tables t{};
  t.work = reinterpret_cast<const Work*>(work.data_ptr<int32_t>());
  t.starts = starts.data_ptr<int32_t>();
  t.runs = reinterpret_cast<const Run*>(runs.data_ptr<int32_t>());
  t.masks = reinterpret_cast<const uint64_t*>(masks.data_ptr<int64_t>());
  t.dead = reinterpret_cast<const uint64_t*>(dead.data_ptr<int64_t>());
  t.n_work = work.size(0), t.batch = batch;
  return t;
}

void Filter::apply(Tables& t, const Part& part) const {
  t.bits = reinterpret_cast<const uint64_t*>(bits.data_ptr<int64_t>());
  t.used = reinterpret_cast<const uint64_t*>(used.data_ptr<int64_t>());
  t.bit_heads = bits.size(0), t.bit_rows = bits.size(1), t.bit_words = bits.size(2);
  t.marks = part.marks.data_ptr<int32_t>();
  t.bit_masks = part.marks.size(1) - 1;
  if (!order.defined()) return;
  t.order = reinterpret_cast<const Piece*>(order.data_ptr<int64_t>());
  t.n_order = n_order.data_ptr<int32_t>();
}

Layout::Layout(std::vector<Part> parts, int64_t heads, int64_t q_len, int64_t kv_len, int64_t keys, int64_t tier)
    : parts(std::move(parts)), heads(heads), q_len(q_len), kv_len(kv_len), keys(keys), tier(tier) {
  TORCH_CHECK(!this->parts.empty(), "a layout needs at least one part");
  for (const Part& part : this->parts) merges |= part.merge != kAlone;
}

std::tuple<Tensor, Tensor> tile_forward(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Layout& layout, double scale,
                                        const Filter* filter, bool with_lse) {
  check_shapes(q_in, k_in, v_in, layout);
  TORCH_CHECK(scale > 0, "scale is ", scale, ", expected a positive number");
  const c10::cuda::CUDAGuard guard(q_in.device());
  const Tensor q = copyable(q_in), k = copyable(k_in), v = copyable(v_in);
  const Tensor out = output_like(q);
  const Tensor lse = with_lse ? at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat)) : Tensor();
  const auto stream = at::cuda::getCurrentCUDAStream();
  int64_t slots = filter && q.size(3) <= 128 ? filter->slots * q.size(0) : 0;
  if (slots > kMostSlots) slots = 0;  // then items are taken whole
  const int64_t rows = q.size(0) * q.size(1) * q.size(2), cut_rows = slots * kTileQueries, n_tickets = 1 + 2 * slots;
  Scratch scratch;
  const auto partial = layout.merges ? scratch.want(q.numel()) : Scratch::kNone;
  const auto own_lse = !with_lse && (layout.merges || layout.tier != 90) ? scratch.want(rows) : Scratch::kNone;
  const auto tickets = filter ? scratch.want(n_tickets) : Scratch::kNone;  // what was taken, and the parts that are done
  const auto cuts = slots ? scratch.want(cut_rows * (q.size(3) + 1)) : Scratch::kNone;  // the parts' outputs and log-sum-exps
  scratch.make();
  if (filter) C10_CUDA_CHECK(cudaMemsetAsync(scratch.of<int32_t>(tickets), 0, 4 * n_tickets, stream));
  const Kernel run = kernel(layout.tier, q.scalar_type());
  for (const Part& part : layout.parts) {
    Forward f{strided(q), strided(k), strided(v), strided(out)};
    f.partial = scratch.of<float>(partial);
    f.lse = with_lse ? lse.data_ptr<float>() : scratch.of<float>(own_lse);
    f.kept = part.kept.get();
    f.tables = part.tables(q.size(0));
    TORCH_CHECK_VALUE(int64_t{f.tables.batch} * f.tables.n_work < int64_t{1} << 29, "q has ", f.tables.batch, " times ", f.tables.n_work,
                      " tiles of ", kTileQueries, " queries, expected less than ", int64_t{1} << 29, " in all");
    if (filter) filter->apply(f.tables, part), f.tables.ticket = scratch.of<int32_t>(tickets);
    f.tables.cuts = slots > 0;
    if (slots) {
      float* const outs = scratch.of<float>(cuts);
      f.cuts = {outs, outs + cut_rows * q.size(3), scratch.of<uint32_t>(tickets) + 1, int32_t(filter->slots)};
    }
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

void bind_tile(pybind11::module_& m) {
  pybind11::class_<Part>(m, "Part").def(pybind11::init<int64_t, int64_t, bool, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                       const Tensor&, const Tensor&>());
  pybind11::class_<Layout>(m, "Layout").def(pybind11::init<std::vector<Part>, int64_t, int64_t, int64_t, int64_t, int64_t>());
  pybind11::class_<Filter>(m, "Filter").def_readonly("bits", &Filter::bits).def_readonly("used", &Filter::used)
      .def_readonly("order", &Filter::order).def_readonly("n_order", &Filter::n_order);
  m.def("sm80_resident_blocks", &sm80::resident_blocks);
  m.def("tile_forward", &tile_forward, pybind11::arg("q"), pybind11::arg("k"), pybind11::arg("v"), pybind11::arg("layout"),
        pybind11::arg("scale"), pybind11::arg("filter") = nullptr, pybind11::arg("with_lse") = true);
}

}  // namespace sparse_attention::bindings
