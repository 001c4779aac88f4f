// One part of a layout on one device, as plain C++ and both tensor-core tiers see it.
#pragma once
#include <cstdint>

namespace sparse_attention {

// Strides in elements: multiples of 8, and `data` aligned to 16 bytes; the last dimension is contiguous.
struct Strided {
  void* data;
  int64_t batch, head, row;
};

// How a part treats what earlier parts left: all but the last write `partial`.
enum Merge : int32_t { kAlone, kFirstPart, kMiddlePart, kLastPart };

constexpr int kTileQueries = 128;

// `count` consecutive key tiles; mask: kFull, or the number of a mask, with kDead if these tiles hold keys that no query sees.
struct Run {
  int32_t first, count, mask;
};

constexpr int kLongQ = 1, kLongK = 2;

// One query tile: the rows q_first + stride * s of `head`, s from 128 * tile on, and which runs hold their key tiles.
struct alignas(16) Work {
  int32_t head, first_run, end_run, tile;
  int32_t q_residue, q_step, k_residue, k_step;  // where the view begins: coordinates (residue, step)
  int32_t q_first, stride, q_count;
  int32_t longs;  // kLongQ, kLongK: whether these residues are among those with one step more: which map holds them
  Run run;  // the first of its runs, of no tiles where there is none
  int32_t unused;
};
static_assert(sizeof(Work) == 16 * sizeof(int32_t), "an item of work is a row of an int32 tensor");

constexpr int kLast = 1 << 30, kDead = 1 << 29, kFull = kDead - 1;
constexpr int kSame = 1 << 30;  // both halves of an item's queries see the same tiles

constexpr int kMostParts = 32;    // of an item
constexpr int kMostSlots = 1536;  // of a call: 97 MiB at head_dim 128

// An item of an order, or one of the parts that a long one is cut into over its key tiles.
struct Piece {
  int32_t item;  // with kSame
  int32_t cut;   // -1 for a whole item, else (slot * kMostParts + part) * kMostParts + parts - 1; slot: where the outputs of its parts begin
};
static_assert(sizeof(Piece) == 8, "an order is an int64 tensor");

// What a tier reads of a part: device pointers; sparse_attention/cuda_tables.py makes the tables.
struct Tables {
  const Work* work;          // [n_work]
  const int32_t* starts;     // [blocks + 1]: block b takes item b, where there is one, then those from starts[b] to starts[b + 1] - 1
  const Piece* order;        // [n_order] or null: blocks take the next of this order when they are free, and `starts` is not read
  const int32_t* n_order;    // on the device
  int32_t* ticket;           // with `order`: 0, counts what was taken
  const Run* runs;
  const uint64_t* masks;     // [n_masks, 128, keys / 64]
  const uint64_t* dead;      // [n_masks, keys / 64]: keys that no query of the tile sees
  const uint64_t* bits;      // [bit_heads, bit_rows, bit_words] or null: the key tiles that each 64 queries may see beside what runs say
  const uint64_t* used;      // [bit_heads, bit_rows / 2, bit_words / 64 rounded up]: which words are not 0 for both halves of a tile
  const int32_t* marks;      // [3, bit_masks + 1]: what a run's mask, the last for kFull, becomes where both halves of the queries may see a
                             // tile, the upper one only, the lower one only
  int32_t n_work, batch;
  int32_t bit_heads, bit_rows, bit_words, bit_masks;
  bool cuts;                 // whether parts of items are taken as such, on sm90; else the first of an item's parts stands for all of it
};

// The sm90 tier's tensor maps of the last call of a launch: the next one of equal sizes and strides changes their addresses only. Not
// for two threads at a time.
struct KeptMaps {
  Strided like[4]{};
  int32_t sizes[5]{};  // batch, kv_heads, head_dim, dtype; the last is 1 once there is anything
  alignas(64) unsigned char maps[8 * 128];
};

// Outputs of the parts of cut items, divided by their sums. The last part to arrive adds them up, in their order.
struct Cuts {
  float* out;         // [batch, slots, 128, head_dim]
  float* lse;         // [batch, slots, 128]
  uint32_t* arrived;  // [batch, slots, 2], zeros: of each half of the queries at the slot of an item's first part
  int32_t slots;
};

struct Forward {
  Strided q, k, v, out;
  float* partial;  // [batch, heads, q_len, head_dim] where the layout has several parts
  float* lse;      // [batch, heads, q_len]; may be null where it has one part, on sm90
  KeptMaps* kept;  // or null
  Tables tables;
  Cuts cuts;
  int32_t batch, heads, kv_heads, q_len, kv_len, head_dim, stride, keys;  // keys: of a tile
  Merge merge;
  bool has_dead;       // some run is marked kDead
  int32_t processors;  // blocks
  float scale;         // above 0
};

// All return a cudaError_t.
namespace sm90 {
int forward_bf16(const Forward& f, void* stream);
int forward_f16(const Forward& f, void* stream);
}  // namespace sm90
namespace sm80 {
int forward_bf16(const Forward& f, void* stream);
int forward_f16(const Forward& f, void* stream);
int resident_blocks(int head_dim);  // that a multiprocessor of the current device holds; 0 on an error
}  // namespace sm80

}  // namespace sparse_attention
