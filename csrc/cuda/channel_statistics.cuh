// Mean and variance over samples and positions: of parts, then of all, then as coefficients.
#pragma once

#include "channel.cuh"

namespace fused::cuda {

// Mean and Σ(z − mean)² of each channel of a part. Corrected two-pass: Chan, Golub and LeVeque,
// "Algorithms for computing the sample variance", 1983. The second time the part comes from the
// caches.
template <class T>
__global__ void __launch_bounds__(kThreads)
    channel_moments_kernel(const __grid_constant__ ChannelProblem p, bool whole) {
  using C = Compute<T>;
  constexpr int N = kPack<T>;
  __shared__ C scratch[kThreads * N];
  const Walk<N> walk(p);
  const C share = C(1) / static_cast<C>(p.length);
  C mean[N] = {}, present[N] = {}, difference[N] = {}, square[N] = {};
  for (Walk<N> at = walk; at.steps > 0; at.next()) {
    if (at.masked_out(p)) continue;
    C x[N];
    load_pack(static_cast<const T*>(p.z) + at.offset(), whole, at.count(), x);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      mean[k] += x[k] * share;  // divided first: values near the largest float do not overflow
      if (k < at.count()) present[k] += C(1);
    }
  }
  sum_channels(p.last, mean, scratch);
  sum_channels(p.last, present, scratch);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    mean[k] *= present[k] > C(0) ? static_cast<C>(p.length) / present[k] : C(0);
  }
  for (Walk<N> at = walk; at.steps > 0; at.next()) {
    if (at.masked_out(p)) continue;
    C x[N];
    load_pack(static_cast<const T*>(p.z) + at.offset(), whole, at.count(), x);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (k >= at.count()) continue;
      const C d = x[k] - mean[k];
      difference[k] += d;
      square[k] += d * d;
    }
  }
  sum_channels(p.last, difference, scratch);
  sum_channels(p.last, square, scratch);
  const int64_t parts = p.last ? p.segments * p.chunks : p.samples * p.chunks;
  double* const means = static_cast<double*>(p.partial) + walk.part * p.channels + walk.channel;
  double* const squares = means + parts * p.channels;
  const int channels = walk.sums_to_write(p);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (k >= channels) continue;
    // In double, where nothing overflows; a sum that has done so is of values that need no repair.
    const bool is_finite = difference[k] - difference[k] == C(0);
    const double d = is_finite ? static_cast<double>(difference[k]) : 0;
    const double shift = present[k] > C(0) ? d / static_cast<double>(present[k]) : 0;
    const double left = static_cast<double>(square[k]) - shift * d;
    means[k] = static_cast<double>(mean[k]) + shift;
    squares[k] = left < 0 ? 0 : left;
  }
  if (channels && walk.channel == 0) {
    static_cast<double*>(p.counts)[walk.part] = static_cast<double>(present[0]);
  }
}

// A team to each statistic; it merges the parts of the segment and the channels of the group.
__global__ void __launch_bounds__(kThreads)
    channel_merge_kernel(const __grid_constant__ StatisticsProblem p) {
  __shared__ double scratch[kThreads / kWarp];
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  // Teams without a statistic go on: the sums need all threads.
  const bool owns = index < p.segments * p.groups;
  const int64_t segment = index / p.groups, group = index % p.groups;
  const int64_t width = p.channels / p.groups, entries = owns ? p.chunks * width : 0;
  const double* const counts = static_cast<const double*>(p.counts) + segment * p.chunks;
  const double* const means =
      static_cast<const double*>(p.partial) + segment * p.chunks * p.channels + group * width;
  const double* const squares = means + p.segments * p.chunks * p.channels;
  double count = 0, mean = 0, square = 0;
  for (int64_t entry = threadIdx.x; entry < entries; entry += blockDim.x) {
    const int64_t chunk = entry / width;
    count += counts[chunk];
    mean += counts[chunk] * means[chunk * p.channels + entry % width];
  }
  count = team_sum(count, scratch);
  mean = team_sum(mean, scratch);
  mean = count > 0 ? mean / count : 0;
  for (int64_t entry = threadIdx.x; entry < entries; entry += blockDim.x) {
    const int64_t chunk = entry / width, i = chunk * p.channels + entry % width;
    const double difference = means[i] - mean;
    // Empty parts have a mean of no meaning.
    if (counts[chunk] > 0) square += squares[i] + counts[chunk] * difference * difference;
  }
  square = team_sum(square, scratch);
  if (!owns || threadIdx.x) return;
  store_any(p.mean, p.mean_storage, index, mean);
  store_any(p.variance, p.variance_storage, index, count > 0 ? square / count : 0);
  if (p.count && group == 0) store_any(p.count, p.count_storage, segment, count);
}

// A team to each statistic; it fills in the planes for the channels of the group.
__global__ void __launch_bounds__(kThreads)
    channel_coefficients_kernel(const __grid_constant__ CoefficientProblem p) {
  __shared__ double scratch[kThreads / kWarp];
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  // Teams without a statistic go on: the sums need all threads.
  const bool owns = index < p.segments * p.groups;
  const int64_t segment = index / p.groups, group = index % p.groups;
  const int64_t width = p.channels / p.groups, first = group * width;
  const int64_t plane = p.segments * p.channels, base = segment * p.channels;
  const int64_t begin = first + threadIdx.x, end = owns ? first + width : begin;
  double mean = 0, rstd = 0;
  if (owns) {
    mean = load_any(p.mean, p.mean_storage, index);
    rstd = 1.0 / ::sqrt(load_any(p.variance, p.variance_storage, index) + p.eps);
  }
  double sum_g = 0, sum_gx = 0;
  for (int64_t channel = begin; channel < end; channel += blockDim.x) {
    const double weight =
        p.norm_weight ? load_any(p.norm_weight, p.norm_weight_storage, channel) : 1.0;
    const double shift = p.norm_bias ? load_any(p.norm_bias, p.norm_bias_storage, channel) : -0.0;
    const int64_t at = base + channel;
    store_any(p.out, p.out_storage, kMean * plane + at, mean);
    store_any(p.out, p.out_storage, kScale * plane + at, rstd * weight);
    store_any(p.out, p.out_storage, kShift * plane + at, shift);
    store_any(p.out, p.out_storage, kRstd * plane + at, rstd);
    if (p.sums) {
      sum_g += weight * load_any(p.sums, p.sums_storage, at);
      sum_gx += weight * load_any(p.sums, p.sums_storage, plane + at);
    }
  }
  if (!p.sums) return;
  double count = static_cast<double>(p.elements);
  if (p.count && owns) count = load_any(p.count, p.count_storage, segment);
  const double share = count > 0 ? 1.0 / count : 0.0;
  const double offset = -rstd * (team_sum(sum_g, scratch) * share);
  const double slope = -rstd * rstd * (team_sum(sum_gx, scratch) * share);
  for (int64_t channel = begin; channel < end; channel += blockDim.x) {
    store_any(p.out, p.out_storage, kSlope * plane + base + channel, slope);
    store_any(p.out, p.out_storage, kOffset * plane + base + channel, offset);
  }
}

}  // namespace fused::cuda
