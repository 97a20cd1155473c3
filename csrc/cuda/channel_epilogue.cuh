// The channel kernels that go over z with its coefficients at hand: forward, and backward's sums
// and gradient.
#pragma once

#include "channel.cuh"

namespace fused::cuda {

// out may be z: each thread reads the elements that it writes, and no others.
template <class T>
__global__ void __launch_bounds__(kThreads)
    channel_forward_kernel(const __grid_constant__ ChannelProblem p, bool whole) {
  using C = Compute<T>;
  constexpr int N = kPack<T>;
  const Output<T> output = output_of<T>(p);
  Walk<N> walk(p);
  const Coefficients<C, N> of(p, walk, whole);
  T* const out = static_cast<T*>(p.out);
  for (; walk.steps > 0; walk.next()) {
    C h[N] = {};
    if (walk.masked_out(p)) {
      store_pack(out + walk.offset(), whole, walk.count(), h);
      continue;
    }
    load_pack(static_cast<const T*>(p.z) + walk.offset(), whole, walk.count(), h);
#pragma unroll
    for (int k = 0; k < N; ++k) h[k] = (h[k] - of.mean[k]) * of.scale[k] + of.shift[k];
    output.write(ChannelPlace<N>{p, walk, whole}, h, static_cast<const T*>(p.residual), out);
  }
}

// With g the gradient of the norm's output: dz = g·scale, where `centred` also + (z − mean)·slope +
// offset; and the sums of g·x̂, g and g·scale over each channel of a part.
template <class T>
__global__ void __launch_bounds__(kThreads)
    channel_backward_kernel(const __grid_constant__ ChannelProblem p, bool whole) {
  using C = Compute<T>;
  constexpr int N = kPack<T>;
  __shared__ C scratch[kThreads * N];
  const Output<T> output = output_of<T>(p);
  Walk<N> walk(p);
  C sum_g[N] = {}, sum_gd[N] = {};
  for (; walk.steps > 0; walk.next()) {
    T* const out = p.out ? static_cast<T*>(p.out) + walk.offset() : nullptr;
    C d[N] = {}, g[N] = {};
    if (walk.masked_out(p)) {
      if (out) store_pack(out, whole, walk.count(), g);
      continue;
    }
    load_pack(static_cast<const T*>(p.z) + walk.offset(), whole, walk.count(), d);
    load_pack(static_cast<const T*>(p.dy) + walk.offset(), whole, walk.count(), g);
    // From the first-level cache every time: kept, they would take the registers of other threads.
    const Coefficients<C, N> of(p, walk, whole);
    C h[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      d[k] -= of.mean[k];
      h[k] = d[k] * of.scale[k] + of.shift[k];
    }
    output.gradient(ChannelPlace<N>{p, walk, whole}, h, g);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (k >= walk.count()) continue;
      sum_g[k] += g[k];
      sum_gd[k] += g[k] * d[k];
    }
    if (!out) continue;
#pragma unroll
    for (int k = 0; k < N; ++k) g[k] *= of.scale[k];
    if (p.centred) {
      C slope[N], offset[N];
      load_plane(p, walk, kSlope, whole, slope);
      load_plane(p, walk, kOffset, whole, offset);
#pragma unroll
      for (int k = 0; k < N; ++k) g[k] += d[k] * slope[k] + offset[k];
    }
    store_pack(out, whole, walk.count(), g);
  }
  if (!p.wanted) return;
  sum_channels(p.last, sum_g, scratch);
  sum_channels(p.last, sum_gd, scratch);
  const int64_t plane = (p.last ? p.segments * p.chunks : p.samples * p.chunks) * p.channels;
  const int channels = walk.sums_to_write(p);
  if (!channels) return;
  C* partial = static_cast<C*>(p.partial) + walk.part * p.channels + walk.channel;
  if (p.wanted & kWantNormWeight) {
    C rstd[N];
    load_plane(p, walk, kRstd, whole, rstd);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      // Zero, where the sum may have overflowed.
      if (k < channels) partial[k] = rstd[k] == C(0) ? C(0) : sum_gd[k] * rstd[k];
    }
    partial += plane;
  }
  if (p.wanted & kWantNormBias) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (k < channels) partial[k] = sum_g[k];
    }
    partial += plane;
  }
  if (p.wanted & kWantBias) {
    const Coefficients<C, N> of(p, walk, whole);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (k < channels) partial[k] = sum_g[k] * of.scale[k];
    }
  }
}

}  // namespace fused::cuda
