// The tile engine's tables as Python hands them over, and its forward.
#pragma once
#include <ATen/ATen.h>

#include <memory>
#include <optional>
#include <vector>

#include "tile.h"

namespace sparse_attention::bindings {

using at::Tensor;

// One launch: the items of work that are handed out together, see struct Tables.
struct Part {
  Part(int64_t stride, int64_t merge, bool has_dead, const Tensor& work, const Tensor& starts, const Tensor& runs,
       const Tensor& masks, const Tensor& dead, const Tensor& marks);

  Tables tables(int64_t batch) const;

  int64_t stride;
  Merge merge;
  bool has_dead;
  Tensor work, starts, runs, masks, dead, marks;
  std::shared_ptr<KeptMaps> kept = std::make_shared<KeptMaps>();
};

// Which key tiles each 64 queries may see beside what the layout says, and the order of its items.
struct Filter {
  Tensor bits, used;
  Tensor order, n_order;  // int64 [items and parts at most], a Piece each; int32 [1]
  int64_t slots = 0;      // of the outputs of parts; 0 where no item is cut

  void apply(Tables& t, const Part& part) const;
};

// The launches of a layout. keys: of a tile. tier: 90 or 80. merges: whether some head has more than one part.
struct Layout {
  Layout(std::vector<Part> parts, int64_t heads, int64_t q_len, int64_t kv_len, int64_t keys, int64_t tier);

  std::vector<Part> parts;
  int64_t heads, q_len, kv_len, keys, tier;
  bool merges = false;
};

// (out, lse); lse is undefined where it was not asked for. scale: above 0.
std::tuple<Tensor, Tensor> tile_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Layout& layout, double scale,
                                        const Filter* filter, bool with_lse);

}  // namespace sparse_attention::bindings
