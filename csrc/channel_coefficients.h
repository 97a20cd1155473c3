// What each channel of a channel problem is multiplied by and shifted by.
#pragma once

#include "channel_problem.h"

namespace fused {

// Statistics in the compute type: for each block groups means and variances. rows = 1: the same for
// all samples; 0: there is no norm.
template <class C>
struct ChannelStatistics {
  const C *mean = nullptr, *variance = nullptr;
  int64_t rows = 0;
  int64_t row_of(int64_t sample) const { return rows > 1 ? sample : 0; }
};

// 1 / √(variance + eps).
double reciprocal_deviation(double variance, double eps);

// Arrays of coefficients (cpu/channel.h) in a buffer of the calling thread.
template <class C>
struct CoefficientArrays {
  // Of `channels` channels; By::column, spread along a line.
  CoefficientArrays(const ChannelProblem& problem, Slot slot, int64_t channels);

  // Fills all but slope and offset, for the channels [first, last) of a sample.
  void fill(const ChannelStatistics<C>& statistics, int64_t sample, int64_t first, int64_t last);
  // Fills slope and offset from mean_s(g·w) and mean_s(g·w·x̂), two for each group from the first
  // channel's on.
  void fill_gradient(const ChannelStatistics<C>& statistics, const double* means, int64_t sample,
                     int64_t first, int64_t last);
  Coefficients from(int64_t channel) const;  // By::row: those of the channels from this one on

 private:
  void spread(C* array, int64_t count) const;

  const ChannelProblem& problem_;
  C *mean_, *scale_, *shift_, *factor_, *slope_, *offset_;
};

// Coefficients of pieces of rows: made once where they are the same for all samples, else for each
// piece. With `means` (two for each statistic) also those of the gradient.
template <class C>
class PieceCoefficients {
 public:
  PieceCoefficients(const ChannelProblem& problem, const ChannelStatistics<C>& statistics,
                    const double* means = nullptr)
      : problem_(problem),
        statistics_(statistics),
        means_(means),
        shared_(statistics.rows <= 1 && !problem.channel_threshold),
        common_(problem, kSharedSlot, shared_ ? problem.channels : 0) {
    if (shared_) fill(common_, 0, 0, problem.channels);
  }
  bool shared() const { return shared_; }

  // Of `count` rows of a sample, from its row `first` on; good until the thread's next call.
  Coefficients of(int64_t sample, int64_t first, int64_t count) const {
    const bool by_row = problem_.by == By::row;
    if (shared_) return common_.from(by_row ? first : 0);
    const int64_t begin = by_row ? first : 0, end = by_row ? first + count : problem_.channels;
    CoefficientArrays<C> own(problem_, kOwnSlot, end - begin);
    fill(own, sample, begin, end);
    return own.from(0);
  }

 private:
  void fill(CoefficientArrays<C>& arrays, int64_t sample, int64_t first, int64_t last) const {
    arrays.fill(statistics_, sample, first, last);
    if (!means_) return;
    const int64_t group = statistics_.row_of(sample) * problem_.groups + first / problem_.width();
    arrays.fill_gradient(statistics_, means_ + 2 * group, sample, first, last);
  }

  const ChannelProblem& problem_;
  const ChannelStatistics<C>& statistics_;
  const double* means_;
  bool shared_;
  CoefficientArrays<C> common_;
};

}  // namespace fused
