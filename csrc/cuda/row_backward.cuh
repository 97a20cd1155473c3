// The backward row kernels. Under a norm the first finds the two means along each row that the
// gradient needs; the second then treats any part of a row by itself. It keeps to some columns and
// goes down the rows of a chunk, so that the sums over the rows stay in registers.
#pragma once

#include "row.cuh"

namespace fused::cuda {

// x becomes x̂, and h the norm's output.
template <class T, int N>
__device__ inline void normalize_pack(const RowParameters<T, N>& parameters,
                                      const RowStatistics<Compute<T>>& statistics,
                                      Compute<T> (&x)[N], Compute<T> (&h)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    x[k] = normalize(x[k], statistics);
    h[k] = x[k] * parameters.weight[k] + parameters.shift[k];
  }
}

// A pack in backward: x̂, and the gradient g of the norm's output.
template <class T, int N = kPack<T>>
struct GradientPack {
  using C = Compute<T>;
  C x[N], g[N];

  __device__ void load(const RowProblem& p, const RowParameters<T, N>& parameters,
                       const Output<T>& output, const RowStatistics<C>& statistics, int64_t row,
                       int64_t i, bool whole, int count) {
    C h[N];
    load_input(static_cast<const T*>(p.z) + row * p.z_stride, parameters, i, whole, count, x);
    load_pack(static_cast<const T*>(p.dy) + row * p.dy_stride + i, whole, count, g);
    normalize_pack(parameters, statistics, x, h);
    output.gradient(RowPlace{row, i, whole, count}, h, g);
  }
};

// Adds a pack to the sums along its row, of g·weight and of g·weight·x̂.
template <class T, int N>
__device__ inline void add_to_row(const GradientPack<T, N>& pack,
                                  const RowParameters<T, N>& parameters, int count,
                                  Compute<T>& sum_g, Compute<T>& sum_gx) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (k < count) {
      const Compute<T> g = pack.g[k] * parameters.weight[k];
      sum_g += g;
      sum_gx += g * pack.x[k];
    }
  }
}

// means: mean(g·weight), 0 where the norm does not centre, and mean(g·weight·x̂), of each row. All
// threads of the block must call it; `present`: the team has a row.
template <class C>
__device__ inline void write_means(const RowProblem& p, int64_t row, bool present, C sum_g,
                                   C sum_gx, C* scratch) {
  sum_g = team_sum(sum_g, scratch);
  sum_gx = team_sum(sum_gx, scratch);
  if (present && threadIdx.x == 0) {
    const C share = C(1) / static_cast<C>(p.cols);
    C* const means = static_cast<C*>(p.means) + row;
    means[0] = static_cast<Norm>(p.norm) == Norm::layer ? sum_g * share : C(0);
    means[p.rows] = sum_gx * share;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    row_means_kernel(const __grid_constant__ RowProblem p, bool whole) {
  using C = Compute<T>;
  __shared__ C scratch[kThreads / kWarp];
  const Output<T> output(p, p.cols);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  // Teams without a row go on: the sums need all threads.
  const int64_t cols = row < p.rows ? p.cols : 0;
  RowStatistics<C> statistics{};
  if (cols) statistics = load_statistics<C>(p, row);
  C sum_g = 0, sum_gx = 0;
  for_each_pack<kPack<T>>(cols, [&](int64_t i, int count) {
    RowParameters<T> parameters;
    parameters.load(p, i, whole, count);
    GradientPack<T> pack;
    pack.load(p, parameters, output, statistics, row, i, whole, count);
    add_to_row(pack, parameters, count, sum_g, sum_gx);
  });
  write_means(p, row, cols != 0, sum_g, sum_gx, scratch);
}

// What falls to a thread of a gradient kernel: a pack of columns, of `cols`, in the rows of a
// chunk.
template <int N>
struct ColumnPart {
  int64_t chunk, i, begin, end;
  int count;

  __device__ ColumnPart(const RowProblem& p, int64_t cols) {
    const int64_t col_blocks = ceil_div(cols, static_cast<int64_t>(blockDim.x) * N);
    chunk = blockIdx.x / col_blocks;
    i = (blockIdx.x % col_blocks * blockDim.x + threadIdx.x) * N;
    count = static_cast<int>(cols - i < N ? cols - i : N);
    const int64_t per_chunk = ceil_div(p.rows, p.chunks);
    begin = chunk * per_chunk;
    end = begin + per_chunk < p.rows ? begin + per_chunk : p.rows;
  }
};

// dz of a pack, and what it adds to the sums over the rows.
template <class T, int N>
__device__ inline void add_to_columns(const GradientPack<T, N>& pack,
                                      const RowParameters<T, N>& parameters, bool normed,
                                      Compute<T> mean_g, Compute<T> mean_gx,
                                      const RowStatistics<Compute<T>>& statistics,
                                      Compute<T> (&sum_gx)[N], Compute<T> (&sum_g)[N],
                                      Compute<T> (&sum_dz)[N], Compute<T> (&dz)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const Compute<T> g = pack.g[k] * parameters.weight[k];
    dz[k] = normed ? normalize_gradient(g, pack.x[k], mean_g, mean_gx, statistics) : g;
    sum_gx[k] += pack.g[k] * pack.x[k];
    sum_g[k] += pack.g[k];
    sum_dz[k] += dz[k];
  }
}

// Leaves the sums that are wanted, for a pack of columns from i on, in a chunk's rows of p.partial.
// All threads of the block must call it. scratch: kThreads · N elements.
template <class C, int N>
__device__ inline void write_sums(const RowProblem& p, int64_t chunk, int64_t i, int count,
                                  C (&sum_gx)[N], C (&sum_g)[N], C (&sum_dz)[N], C* scratch) {
  C* partial = static_cast<C*>(p.partial) + chunk * p.cols + i;
  const auto write = [&](int64_t bit, C(&sums)[N]) {
    if (!(p.wanted & bit)) return;
    sum_over_rows(sums, scratch);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (threadIdx.y == 0 && k < count) partial[k] = sums[k];
    }
    partial += p.chunks * p.cols;
  };
  write(kWantNormWeight, sum_gx);
  write(kWantNormBias, sum_g);
  write(kWantBias, sum_dz);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    row_gradient_kernel(const __grid_constant__ RowProblem p, bool whole) {
  using C = Compute<T>;
  constexpr int N = kPack<T>;
  __shared__ C scratch[kThreads * N];
  const Output<T> output(p, p.cols);
  const auto [chunk, i, begin, end, count] = ColumnPart<N>(p, p.cols);
  const bool normed = static_cast<Norm>(p.norm) != Norm::none;
  const C* const means = static_cast<const C*>(p.means);
  C sum_gx[N] = {}, sum_g[N] = {}, sum_dz[N] = {};
  for (int64_t row = begin + threadIdx.y; count > 0 && row < end; row += blockDim.y) {
    const RowStatistics<C> statistics = load_statistics<C>(p, row);
    // From the first-level cache every time: kept, they would take the registers of other threads.
    RowParameters<T> parameters;
    parameters.load(p, i, whole, count);
    GradientPack<T> pack;
    pack.load(p, parameters, output, statistics, row, i, whole, count);
    const C mean_g = normed ? means[row] : C(0), mean_gx = normed ? means[p.rows + row] : C(0);
    C dz[N];
    add_to_columns(pack, parameters, normed, mean_g, mean_gx, statistics, sum_gx, sum_g, sum_dz,
                   dz);
    store_pack(static_cast<T*>(p.out) + row * p.out_stride + i, whole, count, dz);
  }
  write_sums(p, chunk, i, count, sum_gx, sum_g, sum_dz, scratch);
}

}  // namespace fused::cuda
