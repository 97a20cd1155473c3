// The backward row kernels of gated activations: as row_backward.cuh, with packs of the two halves
// of a row together.
#pragma once

#include "row_backward.cuh"

namespace fused::cuda {

// Of either half. Two of 8 columns would have 48 sums over the rows in a thread's registers.
template <class T>
constexpr int kGatedPack = kPack<T> < 4 ? kPack<T> : 4;

// Packs of the same columns of the two halves, value and gate.
template <class T>
struct GatedPack {
  using C = Compute<T>;
  static constexpr int N = kGatedPack<T>;
  RowParameters<T, N> value_parameters, gate_parameters;
  GradientPack<T, N> value, gate;

  __device__ void load(const RowProblem& p, const Output<T>& output,
                       const RowStatistics<C>& statistics, int64_t row, int64_t i, bool whole,
                       int count) {
    const int64_t gate_i = p.cols / 2 + i;
    const T* const z = static_cast<const T*>(p.z) + row * p.z_stride;
    C g[N];
    value_parameters.load(p, i, whole, count);
    gate_parameters.load(p, gate_i, whole, count);
    load_input(z, value_parameters, i, whole, count, value.x);
    load_input(z, gate_parameters, gate_i, whole, count, gate.x);
    load_pack(static_cast<const T*>(p.dy) + row * p.dy_stride + i, whole, count, g);
    normalize_pack(value_parameters, statistics, value.x, value.g);
    normalize_pack(gate_parameters, statistics, gate.x, gate.g);
    output.gated_gradient(RowPlace{row, i, whole, count}, g, value.g, gate.g);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    gated_means_kernel(const __grid_constant__ RowProblem p, bool whole) {
  using C = Compute<T>;
  __shared__ C scratch[kThreads / kWarp];
  const int64_t half = p.cols / 2;
  const Output<T> output(p, half);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  // Teams without a row go on: the sums need all threads.
  const bool present = row < p.rows;
  RowStatistics<C> statistics{};
  if (present) statistics = load_statistics<C>(p, row);
  C sum_g = 0, sum_gx = 0;
  for_each_pack<kGatedPack<T>>(present ? half : 0, [&](int64_t i, int count) {
    GatedPack<T> pack;
    pack.load(p, output, statistics, row, i, whole, count);
    add_to_row(pack.value, pack.value_parameters, count, sum_g, sum_gx);
    add_to_row(pack.gate, pack.gate_parameters, count, sum_g, sum_gx);
  });
  write_means(p, row, present, sum_g, sum_gx, scratch);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    gated_gradient_kernel(const __grid_constant__ RowProblem p, bool whole) {
  using C = Compute<T>;
  constexpr int N = kGatedPack<T>;
  __shared__ C scratch[kThreads * N];
  const int64_t half = p.cols / 2;
  const Output<T> output(p, half);
  const auto [chunk, i, begin, end, count] = ColumnPart<N>(p, half);
  const bool normed = static_cast<Norm>(p.norm) != Norm::none;
  const C* const means = static_cast<const C*>(p.means);
  C value_gx[N] = {}, value_g[N] = {}, value_dz[N] = {};
  C gate_gx[N] = {}, gate_g[N] = {}, gate_dz[N] = {};
  for (int64_t row = begin + threadIdx.y; count > 0 && row < end; row += blockDim.y) {
    const RowStatistics<C> statistics = load_statistics<C>(p, row);
    GatedPack<T> pack;
    pack.load(p, output, statistics, row, i, whole, count);
    const C mean_g = normed ? means[row] : C(0), mean_gx = normed ? means[p.rows + row] : C(0);
    C dvalue[N], dgate[N];
    add_to_columns(pack.value, pack.value_parameters, normed, mean_g, mean_gx, statistics, value_gx,
                   value_g, value_dz, dvalue);
    add_to_columns(pack.gate, pack.gate_parameters, normed, mean_g, mean_gx, statistics, gate_gx,
                   gate_g, gate_dz, dgate);
    T* const out = static_cast<T*>(p.out) + row * p.out_stride + i;
    store_pack(out, whole, count, dvalue);
    store_pack(out + half, whole, count, dgate);
  }
  write_sums(p, chunk, i, count, value_gx, value_g, value_dz, scratch);
  write_sums(p, chunk, half + i, count, gate_gx, gate_g, gate_dz, scratch);
}

}  // namespace fused::cuda
