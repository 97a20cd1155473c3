// What the channel kernels share: the elements that a thread goes over, and their coefficients.
#pragma once

#include "output.cuh"
#include "problems.h"
#include "team.cuh"

namespace fused::cuda {

// A thread's way through z in packs of N: along a row, or where `last` down some columns.
template <int N>
struct Walk {
  int64_t row, col, cols, row_step = 0, col_step = 0, steps = 0;
  int64_t limit;                   // columns that it may touch end here
  int64_t part, segment, channel;  // channel: of the first element; without `last` of all
  bool owns;                       // whether it has elements at all

  __device__ explicit Walk(const ChannelProblem& p) {
    int64_t left;
    if (p.last) {
      cols = limit = p.channels;
      const int64_t col_blocks = ceil_div(cols, static_cast<int64_t>(blockDim.x) * N);
      part = blockIdx.x / col_blocks;
      segment = part / p.chunks;
      const int64_t rows = p.samples * p.positions / p.segments;
      const int64_t first = part % p.chunks * p.length;
      channel = col = (blockIdx.x % col_blocks * blockDim.x + threadIdx.x) * N;
      row = segment * rows + first + threadIdx.y;
      row_step = blockDim.y;
      left = (p.length < rows - first ? p.length : rows - first) - threadIdx.y;
      owns = col < cols;
      if (owns && left > 0) steps = ceil_div(left, row_step);
    } else {
      cols = p.positions;
      const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
      part = index / p.channels;
      channel = index % p.channels;
      const int64_t sample = part / p.chunks, first = part % p.chunks * p.length;
      segment = p.segments > 1 ? sample : 0;
      row = sample * p.channels + channel;
      col = first + static_cast<int64_t>(threadIdx.x) * N;
      col_step = static_cast<int64_t>(blockDim.x) * N;
      limit = first + p.length < cols ? first + p.length : cols;
      left = limit - col;
      owns = sample < p.samples;
      if (owns && left > 0) steps = ceil_div(left, col_step);
    }
  }

  __device__ int64_t offset() const { return row * cols + col; }
  __device__ int count() const { return static_cast<int>(limit - col < N ? limit - col : N); }
  __device__ void next() {
    row += row_step;
    col += col_step;
    --steps;
  }
  __device__ bool masked_out(const ChannelProblem& p) const {
    return p.mask && !static_cast<const bool*>(p.mask)[row];
  }
  // Whether this thread writes its part's sums, and of how many channels.
  __device__ int sums_to_write(const ChannelProblem& p) const {
    if (!owns || (p.last ? threadIdx.y : threadIdx.x)) return 0;
    return p.last ? count() : 1;
  }
};

// Sums over what is one channel's, in all threads that share it.
template <class C, int N>
__device__ inline void sum_channels(bool last, C (&values)[N], C* scratch) {
  if (last) {
    sum_over_rows(values, scratch);
    return;
  }
  C total = values[0];
#pragma unroll
  for (int k = 1; k < N; ++k) total += values[k];
  total = team_sum(total, scratch);
#pragma unroll
  for (int k = 0; k < N; ++k) values[k] = total;
}

// One plane of the coefficients, for the channels of a walk. whole: as for its packs of z.
template <class C, int N>
__device__ inline void load_plane(const ChannelProblem& p, const Walk<N>& walk,
                                  CoefficientPlane plane, bool whole, C (&out)[N]) {
  const C* const found = static_cast<const C*>(p.coefficients) +
                         (plane * p.segments + walk.segment) * p.channels + walk.channel;
  if (p.last) {
    load_pack(found, whole, walk.count(), out);
    return;
  }
  const C all = *found;
#pragma unroll
  for (int k = 0; k < N; ++k) out[k] = all;
}

// Without a norm those that change nothing; −0 leaves every number as it is, also −0.
template <class C, int N>
struct Coefficients {
  C mean[N], scale[N], shift[N];

  __device__ Coefficients(const ChannelProblem& p, const Walk<N>& walk, bool whole) {
    if (p.coefficients && walk.owns) {
      load_plane(p, walk, kMean, whole, mean);
      load_plane(p, walk, kScale, whole, scale);
      load_plane(p, walk, kShift, whole, shift);
      return;
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
      mean[k] = C(0);
      scale[k] = C(1);
      shift[k] = C(-0.0);
    }
  }
};

// A walk's next pack. Dropout's mask lies over the elements in memory order, or over whole channels
// of a sample.
template <int N>
struct ChannelPlace {
  const ChannelProblem& p;
  const Walk<N>& walk;
  bool whole;

  __device__ int64_t offset() const { return walk.offset(); }
  __device__ int count() const { return walk.count(); }
  template <class C>
  __device__ void drop(const Dropout<C>& dropout, C (&values)[N]) const {
    if (!p.channel_dropout) {
      dropout.apply(walk.row, walk.col, values);
    } else if (p.last) {
      dropout.apply(walk.row / p.positions, walk.col, values);
    } else {
      const C factor = dropout.factor(dropout.words(walk.row / p.channels, walk.channel),
                                      static_cast<int>(walk.channel % kElementsPerCounter));
#pragma unroll
      for (int k = 0; k < N; ++k) values[k] *= factor;
    }
  }
};

template <class T>
__device__ inline Output<T> output_of(const ChannelProblem& p) {
  return Output<T>(p, p.channel_dropout || p.last ? p.channels : p.positions);
}

}  // namespace fused::cuda
