// The statistics of a row, which all threads of its team make: two or three times over the row, and
// all but the first time it comes from the first-level cache.
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
    for_each_pack<kPack<T>>(cols, [&](int64_t i, int count) {
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

// Where forward leaves them for backward.
template <class C>
__device__ inline void store_statistics(const RowProblem& p, int64_t row,
                                        const RowStatistics<C>& statistics) {
  C* next = static_cast<C*>(p.statistics) + row;
  if (static_cast<Norm>(p.norm) == Norm::layer) {
    *next = statistics.mean;
    next += p.rows;
  }
  if (static_cast<Norm>(p.norm) != Norm::none) *next = statistics.rstd;
}

}  // namespace fused::cuda
