// The forward row kernel: a row to a team of threads, which goes over it two or three times. All
// but the first time it comes from the first-level cache.
#pragma once

#include "row.cuh"

namespace fused::cuda {

// Of z + bias over one row; cols is 0 in teams that have none. Corrected two-pass: Chan, Golub and
// LeVeque, "Algorithms for computing the sample variance", 1983. Each term is divided by cols
// before it is added: values near the largest float do not overflow the mean.
template <class T>
__device__ inline RowStatistics<Compute<T>> row_statistics(const RowProblem& p, const T* z,
                                                           int64_t cols, bool whole,
                                                           Compute<T>* scratch) {
  using C = Compute<T>;
  RowStatistics<C> row{C(0), C(1)};
  if (static_cast<Norm>(p.norm) == Norm::none) return row;
  const C share = C(1) / static_cast<C>(p.cols);
  const auto for_each_element = [&](const auto& body) {
    for_each_pack<T>(cols, [&](int64_t i, int count) {
      RowParameters<T> parameters;
      parameters.load_bias(p, i, whole, count);
      C x[kPack<T>];
      load_input(z, parameters, i, whole, count, x);
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) {
        if (k < count) body(x[k]);
      }
    });
  };
  C variance = 0;
  if (static_cast<Norm>(p.norm) == Norm::layer) {
    C sum = 0, difference = 0;
    for_each_element([&](C x) { sum += x * share; });
    const C first = team_sum(sum, scratch);
    for_each_element([&](C x) {
      const C d = x - first;
      difference += d;
      variance += d * d;
    });
    const C shift = team_sum(difference, scratch) * share;
    row.mean = first + shift;
    variance = team_sum(variance, scratch) * share - shift * shift;
  } else {
    for_each_element([&](C x) { variance += x * x * share; });
    variance = team_sum(variance, scratch);
  }
  variance = variance < C(0) ? C(0) : variance;
  row.rstd = C(1) / square_root(variance + static_cast<C>(p.eps));
  return row;
}

// out may be z: no team writes before all of its threads have added to the sums, and after that
// each reads the elements that it writes, and no others.
template <class T>
__global__ void __launch_bounds__(kThreads)
    row_forward_kernel(const __grid_constant__ RowProblem p, bool whole) {
  using C = Compute<T>;
  constexpr int N = kPack<T>;
  __shared__ C scratch[kThreads / kWarp];
  const ActivationParameters<C> activation{static_cast<C>(p.alpha), static_cast<C>(p.beta)};
  const Dropout<C> dropout(p.seed, p.threshold, p.cols);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  // Teams without a row go on: the sums need all threads.
  const int64_t cols = row < p.rows ? p.cols : 0;
  const T* const z = static_cast<const T*>(p.z) + row * p.z_stride;
  const T* const residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
  T* const out = static_cast<T*>(p.out) + row * p.out_stride;
  const RowStatistics<C> statistics = row_statistics(p, z, cols, whole, scratch);
  if (cols && threadIdx.x == 0 && p.statistics) {
    C* next = static_cast<C*>(p.statistics) + row;
    if (static_cast<Norm>(p.norm) == Norm::layer) {
      *next = statistics.mean;
      next += p.rows;
    }
    if (static_cast<Norm>(p.norm) != Norm::none) *next = statistics.rstd;
  }
  for_each_pack<T>(cols, [&](int64_t i, int count) {
    RowParameters<T> parameters;
    parameters.load(p, i, whole, count);
    C h[N];
    load_input(z, parameters, i, whole, count, h);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      h[k] = normalize(h[k], statistics) * parameters.weight[k] + parameters.shift[k];
    }
    activate(p.activation, activation, h);
    if (dropout.threshold) dropout.apply(row, i, h);
    if (p.residual) {
      C added[N];
      load_pack(residual + i, whole, count, added);
#pragma unroll
      for (int k = 0; k < N; ++k) h[k] += added[k];
    }
    store_pack(out + i, whole, count, h);
  });
}

}  // namespace fused::cuda
