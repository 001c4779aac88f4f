// What the launches of a call leave for each other, in one piece of the caching allocator's memory.
#pragma once
#include <c10/cuda/CUDACachingAllocator.h>

#include <cstdint>

namespace sparse_attention::bindings {

// Pieces are wanted, then made all at once, then used, by launches on the stream that was current when they were made.
class Scratch {
 public:
  using Piece = int64_t;
  static constexpr Piece kNone = -1;

  Piece want(int64_t numbers) {  // of 4 bytes; begins at a multiple of 256
    const Piece at = bytes;
    bytes += (4 * numbers + 255) / 256 * 256;
    return at;
  }

  void make() {
    if (bytes) memory = c10::cuda::CUDACachingAllocator::get()->allocate(bytes);
  }

  template <typename T>
  T* of(Piece at) const {
    return at == kNone ? nullptr : reinterpret_cast<T*>(static_cast<uint8_t*>(memory.get()) + at);
  }

 private:
  int64_t bytes = 0;
  c10::DataPtr memory;
};

}  // namespace sparse_attention::bindings
