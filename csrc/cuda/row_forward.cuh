// The forward row kernel: a row to a team of threads, which goes over it two or three times. All
// but the first time it comes from the first-level cache.
#pragma once

#include "row_statistics.cuh"

namespace fused::cuda {

// The norm's output for a pack of a row.
template <class T>
__device__ inline void load_normalized(const RowProblem& p, const T* z,
                                       const RowStatistics<Compute<T>>& statistics, int64_t i,
                                       bool whole, int count, Compute<T> (&h)[kPack<T>]) {
  RowParameters<T> parameters;
  parameters.load(p, i, whole, count);
  load_input(z, parameters, i, whole, count, h);
#pragma unroll
  for (int k = 0; k < kPack<T>; ++k) {
    h[k] = normalize(h[k], statistics) * parameters.weight[k] + parameters.shift[k];
  }
}

// out may be z: no team writes before all of its threads have added to the sums, and after that
// each reads the elements that it writes, and no others.
template <class T>
__global__ void __launch_bounds__(kThreads)
    row_forward_kernel(const __grid_constant__ RowProblem p, bool whole) {
  using C = Compute<T>;
  constexpr int N = kPack<T>;
  __shared__ C scratch[kThreads / kWarp];
  const Output<T> output(p, p.cols);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  // Teams without a row go on: the sums need all threads.
  const int64_t cols = row < p.rows ? p.cols : 0;
  const T* const z = static_cast<const T*>(p.z) + row * p.z_stride;
  const T* const residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
  T* const out = static_cast<T*>(p.out) + row * p.out_stride;
  const RowStatistics<C> statistics = row_statistics(p, z, cols, whole, scratch);
  if (cols && threadIdx.x == 0 && p.statistics) store_statistics(p, row, statistics);
  for_each_pack<N>(cols, [&](int64_t i, int count) {
    C h[N];
    load_normalized(p, z, statistics, i, whole, count, h);
    output.write(RowPlace{row, i, whole, count}, h, residual, out);
  });
}

}  // namespace fused::cuda
