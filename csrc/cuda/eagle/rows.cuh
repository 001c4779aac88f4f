// The units that rows are moved in.
#pragma once
#include "device.cuh"
#include "eagle.h"

namespace sparse_attention::eagle {

template <class U, class Byte>
__device__ __forceinline__ auto unit_at(Byte* data, int64_t offset, int64_t unit) {
  using Target = std::conditional_t<std::is_const_v<Byte>, const U, U>;
  return reinterpret_cast<Target*>(data + offset) + unit;
}

// run(U*) with a null pointer of an unsigned type of this many bytes.
template <class Run>
int by_unit(int bytes, Run run) {
  switch (bytes) {
    case 16: return run(static_cast<uint4*>(nullptr));
    case 8: return run(static_cast<uint64_t*>(nullptr));
    case 4: return run(static_cast<uint32_t*>(nullptr));
    default: return run(static_cast<uint16_t*>(nullptr));
  }
}

}  // namespace sparse_attention::eagle
