// Launchers of the channel kernels.
#include "channel_epilogue.cuh"
#include "channel_statistics.cuh"
#include "launch.h"

namespace fused::cuda {
namespace {

// Launches a kernel that walks over z: a team to each row's chunk, or where `last` a block to a
// chunk of rows and some columns.
template <class T, class Kernel>
int launch_walk(Kernel kernel, const ChannelProblem& p, void* stream) {
  const int64_t cols = p.last ? p.channels : p.positions;
  const bool whole = cols % kPack<T> == 0 && aligned(p.z, p.dy, p.residual, p.out);
  if (p.last) {
    const int64_t packs = ceil_div(p.channels, kPack<T>);
    const dim3 block = block_of(packs, p.length, false);
    const int64_t blocks = p.segments * p.chunks * ceil_div(packs, block.x);
    return launch(kernel, blocks, 1, block, stream, p, whole);
  }
  const int64_t of_chunk = p.length < cols ? p.length : cols;
  const int64_t rows = p.samples * p.chunks * p.channels;
  const dim3 block = block_of(ceil_div(of_chunk, kPack<T>), rows, true);
  const int64_t blocks = ceil_div(rows, block.y);
  return launch(kernel, blocks, 1, block, stream, p, whole);
}

// A team to each statistic, a thread to each of its `entries`.
template <class Kernel, class Problem>
int launch_statistics(Kernel kernel, const Problem& p, int64_t entries, void* stream) {
  const dim3 block = block_of(entries, p.segments * p.groups, false);
  return launch(kernel, ceil_div(p.segments * p.groups, block.y), 1, block, stream, p);
}

}  // namespace

FUSED_EXPORT int fused_cuda_channel_moments(const ChannelProblem* p, int device, void* stream) {
  const DeviceScope scope(device);
  return with_storage(p->z_storage, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch_walk<T>(channel_moments_kernel<T>, *p, stream);
  });
}

FUSED_EXPORT int fused_cuda_channel_merge(const StatisticsProblem* p, int device, void* stream) {
  const DeviceScope scope(device);
  const int64_t entries = p->chunks * (p->channels / p->groups);
  return launch_statistics(channel_merge_kernel, *p, entries, stream);
}

FUSED_EXPORT int fused_cuda_channel_coefficients(const CoefficientProblem* p, int device,
                                                 void* stream) {
  const DeviceScope scope(device);
  return launch_statistics(channel_coefficients_kernel, *p, p->channels / p->groups, stream);
}

FUSED_EXPORT int fused_cuda_channel_forward(const ChannelProblem* p, int device, void* stream) {
  const DeviceScope scope(device);
  return with_storage(p->z_storage, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch_walk<T>(channel_forward_kernel<T>, *p, stream);
  });
}

FUSED_EXPORT int fused_cuda_channel_backward(const ChannelProblem* p, int device, void* stream) {
  const DeviceScope scope(device);
  return with_storage(p->z_storage, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch_walk<T>(channel_backward_kernel<T>, *p, stream);
  });
}

}  // namespace fused::cuda
