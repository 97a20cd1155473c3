// What the row kernels share: one thread's part of a row, and what is known of its columns.
#pragma once

#include "output.cuh"
#include "problems.h"
#include "team.cuh"

namespace fused::cuda {

// Calls body(first column, columns) for the packs of a row that fall to this thread of its team.
template <int N, class F>
__device__ inline void for_each_pack(int64_t cols, const F& body) {
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * N; i < cols;
       i += static_cast<int64_t>(blockDim.x) * N) {
    body(i, static_cast<int>(cols - i < N ? cols - i : N));
  }
}

// Columns of a parameter from i on; `absent` where there is none. wide: it has the compute type,
// and z another.
template <class T, int N>
__device__ inline void load_columns(const void* data, bool wide, Compute<T> absent, int64_t i,
                                    bool whole, int count, Compute<T> (&out)[N]) {
  if (!data) {
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = absent;
  } else if (wide && sizeof(T) != sizeof(Compute<T>)) {
    load_pack(static_cast<const Compute<T>*>(data) + i, whole, count, out);
  } else {
    load_pack(static_cast<const T*>(data) + i, whole, count, out);
  }
}

// Columns from i on of a row.
struct RowPlace {
  int64_t row, i;
  bool whole;
  int columns;

  __device__ int64_t offset() const { return i; }
  __device__ int count() const { return columns; }
  template <class C, int N>
  __device__ void drop(const Dropout<C>& dropout, C (&values)[N]) const {
    dropout.apply(row, i, values);
  }
};

// The parameters of a pack of columns. −0 leaves every number as it is, also −0.
template <class T, int N = kPack<T>>
struct RowParameters {
  using C = Compute<T>;
  C weight[N], shift[N], bias[N];

  __device__ void load_bias(const RowProblem& p, int64_t i, bool whole, int count) {
    load_columns<T>(p.bias, p.bias_storage != p.z_storage, C(-0.0), i, whole, count, bias);
  }
  __device__ void load(const RowProblem& p, int64_t i, bool whole, int count) {
    load_bias(p, i, whole, count);
    load_columns<T>(p.norm_weight, p.norm_weight_storage != p.z_storage, C(1), i, whole, count,
                    weight);
    load_columns<T>(p.norm_bias, p.norm_bias_storage != p.z_storage, C(-0.0), i, whole, count,
                    shift);
  }
};

// z + bias of a pack.
template <class T, int N>
__device__ inline void load_input(const T* z, const RowParameters<T, N>& parameters, int64_t i,
                                  bool whole, int count, Compute<T> (&x)[N]) {
  load_pack(z + i, whole, count, x);
#pragma unroll
  for (int k = 0; k < N; ++k) x[k] += parameters.bias[k];
}

// The statistics that forward has left, without a norm those that change nothing.
template <class C>
__device__ inline RowStatistics<C> load_statistics(const RowProblem& p, int64_t row) {
  const C* const found = static_cast<const C*>(p.statistics);
  switch (static_cast<Norm>(p.norm)) {
    case Norm::layer:
      return {found[row], found[p.rows + row]};
    case Norm::rms:
      return {C(0), found[row]};
    default:
      return {C(0), C(1)};
  }
}

}  // namespace fused::cuda
