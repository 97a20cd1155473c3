// Forward: each group right after its statistics where it is small enough to be in the cache still,
// else all statistics first.
#include "channel.h"

namespace fused {
namespace {

ChannelKernel forward_kernel(const ChannelProblem& p) {
  return p.kernels->forward[static_cast<int>(p.storage)][static_cast<int>(p.by)][p.through()];
}

}  // namespace

template <class C>
void channel_apply(const ChannelProblem& p, const ChannelStatistics<C>& statistics) {
  if (!p.elements()) return;
  const ChannelKernel kernel = forward_kernel(p);
  const PieceCoefficients<C> coefficients(p, statistics);
  const auto body = [&](int64_t row, int64_t count, int64_t sample) {
    ChannelRows work = p.view(row, count);
    work.coefficients = coefficients.of(sample, row - sample * p.rows, count);
    p.run(kernel, work);
  };
  for_each_piece(p, coefficients.shared() && p.by == By::column, body);
}

template <class C>
void channel_forward(const ChannelProblem& p, C* mean, C* variance, C* present) {
  if (!p.elements() || !is_small(p, p.element_size())) {
    channel_statistics(p, mean, variance, present);
    channel_apply(p, ChannelStatistics<C>{mean, variance, p.blocks()});
    return;
  }
  const ChannelKernel kernel = forward_kernel(p);
  if (p.by == By::column) {
    const int64_t grain = std::max<int64_t>(1, kGrain / (p.rows * p.cols));
    parallel_for(0, p.samples, grain, [&](int64_t begin, int64_t end) {
      CoefficientArrays<C> own(p, kOwnSlot, p.channels);
      for (int64_t sample = begin; sample < end; ++sample) {
        statistics_of_sample(p, sample, mean + sample * p.groups, variance + sample * p.groups,
                             present ? present + sample : nullptr);
        own.fill({mean, variance, p.samples}, sample, 0, p.channels);
        ChannelRows work = p.view(sample * p.rows, p.rows);
        work.coefficients = own.from(0);
        p.run(kernel, work);
      }
    });
    return;
  }
  for_each_groups(p, [&](int64_t sample, int64_t first, int64_t last) {
    const int64_t width = p.width();
    statistics_of_groups(p, sample, first, last, mean, variance);
    CoefficientArrays<C> own(p, kOwnSlot, (last - first) * width);
    own.fill({mean, variance, p.blocks()}, sample, first * width, last * width);
    ChannelRows work = p.view_groups(sample, first, last);
    work.coefficients = own.from(0);
    kernel(p.stages, work);
  });
}

#define FUSED_INSTANTIATE(C)                                                       \
  template void channel_apply(const ChannelProblem&, const ChannelStatistics<C>&); \
  template void channel_forward(const ChannelProblem&, C*, C*, C*);
FUSED_INSTANTIATE(float)
FUSED_INSTANTIATE(double)
#undef FUSED_INSTANTIATE

}  // namespace fused
