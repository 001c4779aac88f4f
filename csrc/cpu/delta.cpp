#include "engines.h"
#include "simd.h"

namespace sparse_attention {
namespace {

template <class T>
void row_delta(const BackwardParams& p, const Tensor4& out, const Acc<T>* dlse, Acc<T>* delta) {
  using A = Acc<T>;
  const int64_t rows = int64_t(p.batch) * p.heads * p.q_len;
#pragma omp parallel for if (rows > 256)
  for (int64_t index = 0; index < rows; ++index) {
    const int64_t r = index % p.q_len, h = index / p.q_len % p.heads, b = index / p.q_len / p.heads;
    const T* y = static_cast<const T*>(out.data) + b * out.batch + h * out.head + r * out.row;
    const T* dy = static_cast<const T*>(p.dout.data) + b * p.dout.batch + h * p.dout.head + r * p.dout.row;
    A sum[8] = {};  // head_dim is a multiple of 8
    for (int d = 0; d < p.head_dim; d += 8) {
      A a[8], c[8];
      widen(y + d, a, 8);
      widen(dy + d, c, 8);
      for (int l = 0; l < 8; ++l) sum[l] += a[l] * c[l];
    }
    const A total = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
    delta[index] = total - (dlse ? dlse[index] : A(0));
  }
}

}  // namespace

void row_delta(Dtype dtype, const BackwardParams& p, const Tensor4& out, const void* dlse, void* delta) {
  const auto f32 = [&](auto run) { run(p, out, static_cast<const float*>(dlse), static_cast<float*>(delta)); };
  switch (dtype) {
    case Dtype::f32: return f32(row_delta<float>);
    case Dtype::bf16: return f32(row_delta<BFloat16>);
    case Dtype::f16: return f32(row_delta<Float16>);
    case Dtype::f64:
      return row_delta<double>(p, out, static_cast<const double*>(dlse), static_cast<double*>(delta));
  }
}

}  // namespace sparse_attention
