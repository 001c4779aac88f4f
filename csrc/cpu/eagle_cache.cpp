// Rows of a key and value cache: appended, retrieved, and the accepted ones moved to the front.
#include <cstring>
#include <vector>

#include "eagle.h"

namespace sparse_attention::eagle {
namespace {

char* row_of(const Rows5& x, int64_t element, int64_t layer, int64_t b, int64_t h, int64_t r) {
  return x.data + (layer * x.stride_layer + b * x.stride_batch + h * x.stride_head + r * x.stride_row) * element;
}

constexpr int64_t kParallelBytes = 1 << 19;

}  // namespace

bool append_lengths(const int64_t* lengths, int64_t batch, int64_t count, int64_t rows, int64_t* out) {
  bool malformed = false;
  for (int64_t b = 0; b < batch; ++b) {
    const bool fits = lengths[b] >= 0 && lengths[b] <= rows - count;
    malformed |= !fits;
    out[b] = fits ? lengths[b] + count : lengths[b];
  }
  return malformed;
}

bool append(const Rows5& cache, const Rows5& fresh, int64_t row_bytes, int64_t element, const int64_t* lengths, bool strict) {
  const int64_t count = fresh.rows;
  bool malformed = false;
  for (int64_t b = 0; b < cache.batch; ++b) malformed |= lengths[b] < 0 || lengths[b] > cache.rows - count;
  if (malformed && strict) return true;
#pragma omp parallel for collapse(2) if (cache.batch * cache.heads * count * row_bytes > kParallelBytes)
  for (int64_t b = 0; b < cache.batch; ++b)
    for (int64_t h = 0; h < cache.heads; ++h) {
      if (lengths[b] < 0 || lengths[b] > cache.rows - count) continue;
      for (int64_t r = 0; r < count; ++r)
        std::memcpy(row_of(cache, element, 0, b, h, lengths[b] + r), row_of(fresh, element, 0, b, h, r), row_bytes);
    }
  return malformed;
}

bool retrieve(const Rows5& cache, const int64_t* indices, int64_t count, int64_t row_bytes, int64_t element, char* out) {
  bool malformed = false;
#pragma omp parallel for collapse(2) reduction(|| : malformed) if (cache.batch * cache.heads * count * row_bytes > kParallelBytes)
  for (int64_t b = 0; b < cache.batch; ++b)
    for (int64_t h = 0; h < cache.heads; ++h)
      for (int64_t n = 0; n < count; ++n) {
        const int64_t r = indices[b * count + n];
        char* to = out + ((b * cache.heads + h) * count + n) * row_bytes;
        if (r >= 0 && r < cache.rows)
          std::memcpy(to, row_of(cache, element, 0, b, h, r), row_bytes);
        else
          std::memset(to, 0, row_bytes);
        malformed = malformed || r < -1 || r >= cache.rows;
      }
  return malformed;
}

bool commit_valid(const CommitIn& in, const Rows5& like, uint8_t* valid) {
  bool malformed = false;
  const int64_t rows = in.block_table ? in.page * in.blocks : in.rows;
  for (int64_t b = 0; b < in.batch; ++b) {
    const int64_t start = in.lengths[b], last = in.accept_length[b];
    bool good = last >= -1 && last < in.width;
    if (good && last >= 0) {
      good = start >= 0 && start <= rows - last - 1;
      const int64_t* index = in.accept_index + b * in.width;
      const auto page_there = [&](int64_t row) {
        if (!in.block_table) return true;
        const int64_t page = in.block_table[b * in.blocks + row / in.page];
        return page >= 0 && page < like.batch;
      };
      for (int64_t j = 0; good && j <= last; ++j) {
        good = index[j] >= 0 && index[j] < rows - start && (in.nodes < 0 || index[j] < in.nodes);
        good = good && page_there(start + index[j]) && page_there(start + j);
      }
    }
    valid[b] = good;
    malformed |= !good;
  }
  return malformed;
}

void commit_rows(const CommitIn& in, const std::vector<Rows5>& layers, int64_t row_bytes, int64_t element, const uint8_t* valid) {
  int64_t moved = 0, total_layers = 0;
  for (int64_t b = 0; b < in.batch; ++b) moved += valid[b] ? in.accept_length[b] + 1 : 0;
  std::vector<std::pair<int64_t, int64_t>> place;  // (tensor, layer in it)
  for (size_t t = 0; t < layers.size(); ++t)
    for (int64_t l = 0; l < layers[t].layers; ++l) place.emplace_back(t, l);
  total_layers = int64_t(place.size());
#pragma omp parallel if (total_layers * moved * layers[0].heads * row_bytes > kParallelBytes)
  {
    std::vector<char> taken;
#pragma omp for
    for (int64_t item = 0; item < total_layers; ++item) {
      const Rows5& x = layers[place[item].first];
      const auto row = [&](int64_t b, int64_t h, int64_t r) {
        if (!in.block_table) return row_of(x, element, place[item].second, b, h, r);
        return row_of(x, element, place[item].second, in.block_table[b * in.blocks + r / in.page], h, r % in.page);
      };
      for (int64_t b = 0; b < in.batch; ++b) {
        if (!valid[b]) continue;
        const int64_t *index = in.accept_index + b * in.width, start = in.lengths[b], count = in.accept_length[b] + 1;
        int64_t kept = 0;  // rows that are where they belong
        while (kept < count && index[kept] == kept) ++kept;
        if (kept == count) continue;
        taken.resize((count - kept) * row_bytes);
        for (int64_t h = 0; h < x.heads; ++h) {
          for (int64_t j = kept; j < count; ++j) std::memcpy(taken.data() + (j - kept) * row_bytes, row(b, h, start + index[j]), row_bytes);
          for (int64_t j = kept; j < count; ++j) std::memcpy(row(b, h, start + j), taken.data() + (j - kept) * row_bytes, row_bytes);
        }
      }
    }
  }
}

void commit_hidden(const CommitIn& in, const char* hidden, int64_t row_bytes, char* out, int64_t* lengths_out, const uint8_t* valid) {
  for (int64_t b = 0; b < in.batch; ++b) {
    const int64_t count = valid[b] ? in.accept_length[b] + 1 : 0;
    lengths_out[b] = in.lengths[b] + count;
    if (!hidden) continue;
    for (int64_t j = 0; j < in.width; ++j) {
      char* to = out + (b * in.width + j) * row_bytes;
      if (j < count)
        std::memcpy(to, hidden + (b * in.nodes + in.accept_index[b * in.width + j]) * row_bytes, row_bytes);
      else
        std::memset(to, 0, row_bytes);
    }
  }
}

}  // namespace sparse_attention::eagle
