// The forward row kernel of gated activations: statistics of a row of p.cols columns, then packs of
// its two halves together.
#pragma once

#include "row_forward.cuh"

namespace fused::cuda {

template <class T>
__global__ void __launch_bounds__(kThreads)
    gated_forward_kernel(const __grid_constant__ RowProblem p, bool whole) {
  using C = Compute<T>;
  constexpr int N = kPack<T>;
  __shared__ C scratch[kThreads / kWarp];
  const int64_t half = p.cols / 2;
  const Output<T> output(p, half);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  // Teams without a row go on: the sums need all threads.
  const bool present = row < p.rows;
  const T* const z = static_cast<const T*>(p.z) + row * p.z_stride;
  const T* const residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
  T* const out = static_cast<T*>(p.out) + row * p.out_stride;
  const RowStatistics<C> statistics = row_statistics(p, z, present ? p.cols : 0, whole, scratch);
  if (present && threadIdx.x == 0) store_statistics(p, row, statistics);
  for_each_pack<N>(present ? half : 0, [&](int64_t i, int count) {
    C value[N], other[N];
    load_normalized(p, z, statistics, i, whole, count, value);
    load_normalized(p, z, statistics, half + i, whole, count, other);
    output.write_gated(RowPlace{row, i, whole, count}, value, other, residual, out);
  });
}

}  // namespace fused::cuda
