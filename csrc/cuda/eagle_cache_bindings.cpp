// Between Python and the kernels that move rows of caches.
#include <vector>

#include "eagle_bindings.h"

namespace sparse_attention::bindings {
namespace {

using c10::cuda::CUDAGuard;

// A cache [(layers,) batch or pages, heads, rows, head_dim], the last dimension contiguous.
void check_cache(const Tensor& x, const char* name, int64_t dims, const Tensor& like) {
  TORCH_CHECK(x.is_cuda() && x.device() == like.device() && x.scalar_type() == like.scalar_type() && x.dim() == dims && x.numel() > 0 &&
                  (x.stride(-1) == 1 || x.size(-1) == 1) && !x.is_neg(),
              name, " must be a ", like.scalar_type(), " tensor of ", dims, " dimensions, the last contiguous, on ", like.device());
}

eagle::Strides strides_of(const Tensor& x) {
  const int64_t element = x.element_size(), at = x.dim() - 4;
  return {at ? x.stride(0) * element : 0, x.stride(at) * element, x.stride(at + 1) * element, x.stride(at + 2) * element};
}

// The largest unit, up to 16 bytes, of which x's rows are whole numbers and to which all of them are aligned.
int unit_of(const Tensor& x, int most) {
  const int64_t element = x.element_size();
  int64_t all = reinterpret_cast<intptr_t>(x.data_ptr()) | x.size(-1) * element;
  for (int64_t d = 0; d + 1 < x.dim(); ++d)
    if (x.size(d) > 1) all |= x.stride(d) * element;
  while (all % most) most /= 2;
  return most;
}

char* data_of(const Tensor& x) { return static_cast<char*>(x.data_ptr()); }

bool append(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k_new, const Tensor& v_new, const Tensor& lengths,
            const Tensor& lengths_out, bool) {
  const Tensor *caches[2] = {&k_cache, &v_cache}, *fresh[2] = {&k_new, &v_new};
  eagle::Append in{};
  int unit = 16;
  for (int x = 0; x < 2; ++x) {
    check_cache(*caches[x], "k_cache and v_cache", 4, k_cache);
    check_cache(*fresh[x], "k_new and v_new", 4, k_cache);
    TORCH_CHECK(caches[x]->sizes() == k_cache.sizes() && fresh[x]->sizes() == k_new.sizes() && k_new.size(0) == k_cache.size(0) &&
                    k_new.size(1) == k_cache.size(1) && k_new.size(3) == k_cache.size(3),
                "caches and new rows must agree in shape");
    in.cache[x] = data_of(*caches[x]), in.fresh[x] = data_of(*fresh[x]);
    in.cache_strides[x] = strides_of(*caches[x]), in.fresh_strides[x] = strides_of(*fresh[x]);
    unit = unit_of(*fresh[x], unit_of(*caches[x], unit));
  }
  const int64_t batch = k_cache.size(0), row_units = k_cache.size(3) * k_cache.element_size() / unit;
  as_int(k_new.size(1) * k_new.size(2) * row_units, "the number of units in a request's new rows");
  in.batch = as_int(batch, "batch"), in.heads = int(k_new.size(1)), in.count = int(k_new.size(2)), in.units = int(row_units);
  in.rows = k_cache.size(2);
  in.lengths = longs(lengths, "lengths", {batch}, k_cache), in.lengths_out = longs(lengths_out, "lengths_out", {batch}, k_cache);
  const CUDAGuard guard(k_cache.device());
  launched(eagle::append(in, unit, stream()));
  return false;
}

bool retrieve(const Tensor& k_cache, const Tensor& v_cache, const Tensor& indices, const Tensor& k, const Tensor& v) {
  const Tensor *caches[2] = {&k_cache, &v_cache}, *outs[2] = {&k, &v};
  check_cache(k_cache, "k_cache", 4, k_cache);
  TORCH_CHECK(indices.dim() == 2, "indices must be [batch, n]");
  const int64_t batch = k_cache.size(0), count = indices.size(1);
  eagle::Retrieve in{};
  int unit = 16;
  for (int x = 0; x < 2; ++x) {
    check_cache(*caches[x], "k_cache and v_cache", 4, k_cache);
    TORCH_CHECK(caches[x]->sizes() == k_cache.sizes() && outs[x]->scalar_type() == k_cache.scalar_type(), "caches, k and v must agree");
    checked(*outs[x], "k and v", {batch, k_cache.size(1), count, k_cache.size(3)}, k_cache);
    in.cache[x] = data_of(*caches[x]), in.out[x] = data_of(*outs[x]), in.strides[x] = strides_of(*caches[x]);
    unit = unit_of(*outs[x], unit_of(*caches[x], unit));
  }
  const int64_t row_units = k_cache.size(3) * k_cache.element_size() / unit;
  as_int(k_cache.size(1) * count * row_units, "the number of units in a request's rows");
  in.batch = as_int(batch, "batch"), in.heads = int(k_cache.size(1)), in.count = int(count), in.units = int(row_units);
  in.rows = k_cache.size(2);
  in.indices = longs(indices, "indices", {batch, count}, k_cache);
  const CUDAGuard guard(k_cache.device());
  launched(eagle::retrieve(in, unit, stream()));
  return false;
}

bool commit(const std::vector<Tensor>& layers, const Tensor& lengths, const Tensor& accept_index, const Tensor& accept_length,
            const Maybe& block_table, const Maybe& hidden, const Tensor& lengths_out, const Maybe& hidden_out, bool) {
  TORCH_CHECK(!layers.empty() && accept_index.dim() == 2, "expected caches and accept_index [batch, width]");
  const Tensor& head = layers[0];
  const int64_t batch = accept_index.size(0), width = accept_index.size(1);
  for (const Tensor& x : layers) {
    check_cache(x, "caches", 5, head);
    TORCH_CHECK(x.size(1) == head.size(1) && x.size(3) == head.size(3), "caches must agree in batch and rows");
  }
  TORCH_CHECK(block_table || head.size(1) == batch, "caches have batch ", head.size(1), ", expected ", batch);
  TORCH_CHECK(bool(hidden) == bool(hidden_out), "hidden needs a place");
  TORCH_CHECK(width <= 2048, "accept_index has ", width, " columns, expected 2048 at most");
  eagle::Commit in{};
  in.batch = as_int(batch, "batch"), in.width = int(width);
  in.rows = head.size(3), in.nodes = -1;
  in.lengths = longs(lengths, "lengths", {batch}, head);
  in.accept_index = longs(accept_index, "accept_index", {batch, width}, head);
  in.accept_length = longs(accept_length, "accept_length", {batch}, head);
  if (block_table) {
    TORCH_CHECK(block_table->dim() == 2 && block_table->size(1) > 0, "block_table must be [batch, blocks]");
    in.blocks = as_int(block_table->size(1), "blocks");
    in.block_table = longs(*block_table, "block_table", {batch, in.blocks}, head);
    in.page = head.size(3), in.pages = head.size(1), in.rows = in.page * in.blocks;
  }
  int64_t* ends = longs(lengths_out, "lengths_out", {batch}, head);
  if (hidden) {
    TORCH_CHECK(hidden->dim() == 3 && hidden_out->scalar_type() == hidden->scalar_type(), "hidden must be [batch, nodes, size]");
    in.nodes = hidden->size(1), in.hidden_bytes = hidden->size(2) * hidden->element_size();
    in.hidden = data_of(checked(*hidden, "hidden", {batch, in.nodes, hidden->size(2)}, head));
    checked(*hidden_out, "hidden_out", {batch, width, hidden->size(2)}, head);
  }
  const CUDAGuard guard(head.device());
  for (size_t first = 0; first < layers.size();) {
    const Tensor& like = layers[first];
    int unit = 16;
    in.caches = 0;
    while (first + in.caches < layers.size() && in.caches < eagle::Commit::kCaches) {
      const Tensor& x = layers[first + in.caches];
      if (x.sizes() != like.sizes() || x.strides() != like.strides()) break;
      in.cache[in.caches++] = data_of(x);
      unit = unit_of(x, unit);
    }
    in.layers = as_int(like.size(0), "layers"), in.heads = as_int(like.size(2), "heads");
    in.units = as_int(like.size(4) * like.element_size() / unit, "units");
    in.strides = strides_of(like);
    in.lengths_out = first ? nullptr : ends;
    in.hidden_out = first || !hidden ? nullptr : data_of(*hidden_out);
    const int64_t items = batch * in.caches * in.layers * in.heads * in.units;
    as_int(items, "the number of columns of all layers");
    Tensor scratch;
    if (width > eagle::Commit::kHeldRows) scratch = at::empty({width * items * unit}, head.options().dtype(at::kByte));
    in.scratch = scratch.defined() ? data_of(scratch) : nullptr;
    launched(eagle::commit(in, unit, stream()));
    first += in.caches;
  }
  return false;
}

}  // namespace

void bind_eagle_cache(pybind11::module_& m) {
  m.def("eagle_append", &append);
  m.def("eagle_retrieve", &retrieve);
  m.def("eagle_commit", &commit);
}

}  // namespace sparse_attention::bindings
