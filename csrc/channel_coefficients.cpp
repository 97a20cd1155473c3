#include "channel_coefficients.h"

#include <cmath>

#include "cpu/random.h"

namespace fused {

double reciprocal_deviation(double variance, double eps) { return 1.0 / std::sqrt(variance + eps); }

template <class C>
CoefficientArrays<C>::CoefficientArrays(const ChannelProblem& problem, Slot slot, int64_t channels)
    : problem_(problem) {
  const int64_t size = channels * problem.inner * problem.fold;
  mean_ = static_cast<C*>(thread_buffer(slot, sizeof(C) * static_cast<size_t>(6 * size)));
  scale_ = mean_ + size;
  shift_ = scale_ + size;
  slope_ = shift_ + size;
  offset_ = slope_ + size;
  factor_ = problem.channel_threshold ? offset_ + size : nullptr;
}

template <class C>
void CoefficientArrays<C>::fill(const ChannelStatistics<C>& statistics, int64_t sample,
                                int64_t first, int64_t last) {
  const ChannelProblem& p = problem_;
  const int64_t count = last - first;
  const C* const weight = p.weight ? static_cast<const C*>(p.weight) + first : nullptr;
  const C* const bias = p.bias ? static_cast<const C*>(p.bias) + first : nullptr;
  if (!statistics.rows) {
    std::fill_n(mean_, count, C(0));
    std::fill_n(scale_, count, C(1));
  } else {
    const int64_t width = p.width(), base = statistics.row_of(sample) * p.groups;
    for (int64_t group = first / width; group * width < last; ++group) {
      const C mean = statistics.mean[base + group];
      const double rstd =
          reciprocal_deviation(static_cast<double>(statistics.variance[base + group]), p.eps);
      const int64_t end = std::min(last, (group + 1) * width) - first;
      for (int64_t i = std::max(first, group * width) - first; i < end; ++i) {
        mean_[i] = mean;
        scale_[i] = static_cast<C>(weight ? rstd * static_cast<double>(weight[i]) : rstd);
      }
    }
  }
  // −0 leaves every number as it is, also −0.
  for (int64_t i = 0; i < count; ++i) shift_[i] = bias ? bias[i] : C(-0.0);
  if (factor_) {
    const uint32_t threshold = p.channel_threshold;
    const double scale = threshold < 65536 ? 65536.0 / (65536.0 - threshold) : 0.0;
    const portable::PhiloxKeys keys(p.stages.seed);
    portable::KeepBlock keep;
    const uint64_t counter =
        static_cast<uint64_t>(sample) * static_cast<uint64_t>(counters_of(p.channels));
    for (int64_t channel = first; channel < last; ++channel) {
      const int64_t offset = channel % portable::kRandomBlock;
      if (offset == 0 || channel == first) {
        keep.draw(keys, counter + static_cast<uint64_t>((channel - offset) / kElementsPerCounter),
                  threshold);
      }
      factor_[channel - first] = static_cast<C>(keep.factor(static_cast<int>(offset), scale));
    }
    spread(factor_, count);
  }
  spread(mean_, count);
  spread(scale_, count);
  spread(shift_, count);
}

template <class C>
void CoefficientArrays<C>::fill_gradient(const ChannelStatistics<C>& statistics,
                                         const double* means, int64_t sample, int64_t first,
                                         int64_t last) {
  const ChannelProblem& p = problem_;
  const int64_t width = p.width(), row = statistics.row_of(sample);
  const C* const variance = statistics.variance + row * p.groups;
  for (int64_t group = first / width; group * width < last; ++group, means += 2) {
    const double rstd = reciprocal_deviation(static_cast<double>(variance[group]), p.eps);
    const int64_t begin = std::max(first, group * width), end = std::min(last, (group + 1) * width);
    std::fill(slope_ + (begin - first), slope_ + (end - first),
              static_cast<C>(-rstd * rstd * means[1]));
    std::fill(offset_ + (begin - first), offset_ + (end - first), static_cast<C>(-rstd * means[0]));
  }
  spread(slope_, last - first);
  spread(offset_, last - first);
}

template <class C>
void CoefficientArrays<C>::spread(C* array, int64_t count) const {
  if (problem_.by == By::row) return;
  const int64_t inner = problem_.inner, cols = count * inner;
  for (int64_t i = count; inner > 1 && i-- > 0;) {
    const C value = array[i];
    std::fill_n(array + i * inner, inner, value);
  }
  for (int64_t k = 1; k < problem_.fold; ++k) std::copy_n(array, cols, array + k * cols);
}

template <class C>
Coefficients CoefficientArrays<C>::from(int64_t channel) const {
  return {mean_ + channel,  scale_ + channel,
          shift_ + channel, factor_ ? factor_ + channel : nullptr,
          slope_ + channel, offset_ + channel};
}

template struct CoefficientArrays<float>;
template struct CoefficientArrays<double>;

}  // namespace fused
