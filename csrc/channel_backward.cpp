// Backward: the sums, the means that they give each statistic, dz, and the parameters' gradients.
//
// As in forward, a group or a sample that is small enough is finished while it is in the cache;
// else all sums are made first, and g is made again for dz.
#include <utility>

#include "channel.h"

namespace fused {
namespace {

// Where g is kept for the second pass of a problem that is not small: in dz, which has room for it
// where it is of the compute type, else in memory of its own while that stays in the caches.
// BatchNorm + SiLU backward of 8192 × 256: 1.09 for 1.47 ms in float32, 1.06 for 1.46 in bfloat16
// (AMD EPYC 9004, 2 threads, November 2026).
template <class C>
class KeptGradient {
 public:
  KeptGradient(const ChannelProblem& p, bool wanted) {
    if (wanted && p.storage == p.compute) data_ = p.out;
    if (!wanted || data_) return;
    const size_t bytes = sizeof(C) * static_cast<size_t>(p.elements());
    if (bytes > last_level_cache() / 2) return;
    own_ = new_memory(bytes);
    data_ = own_.get();
  }
  void* data() const { return data_; }

 private:
  std::shared_ptr<void> own_;
  void* data_ = nullptr;
};

// The problem whose gradient of y is that of the shortcut, made already: g itself.
ChannelProblem behind_shortcut(const ChannelProblem& p) {
  ChannelProblem norm = p;
  norm.dy = p.dshortcut;
  norm.shortcut = norm.dshortcut = nullptr;
  norm.stages = stages_of(p.compute, 0, 0.0, 0.0);
  norm.stages.streaming = p.stages.streaming;
  norm.channel_threshold = 0;
  return norm;
}

template <class C>
struct Backward {
  const ChannelProblem& p;
  const ChannelStatistics<C>& statistics;
  const C* present;
  const int64_t channels = p.channels, groups = p.groups, width = p.width();

  // The pass that makes dz, of the gradient that was kept or of that which it makes again.
  ChannelKernel kernel(bool of_kept) const {
    const int storage = static_cast<int>(p.storage), by = static_cast<int>(p.by);
    return of_kept ? p.kernels->kept_gradient[storage][by]
                   : p.kernels->gradient[storage][by][p.through()];
  }

  // mean_s(g·w) and mean_s(g·w·x̂), two for each of the groups [first, last) of a block; the sums
  // from the first one's on.
  void fill_means(int64_t block, int64_t first, int64_t last, const double* g, const double* gx,
                  double* means) const {
    const double count = present ? static_cast<double>(present[statistics.row_of(block)])
                                 : static_cast<double>(p.elements() / p.blocks() / groups);
    const double share = count > 0 ? 1.0 / count : 0.0;
    const C* weight = p.weight ? static_cast<const C*>(p.weight) + first * width : nullptr;
    for (int64_t group = first; group < last; ++group, means += 2, g += width, gx += width) {
      double sum_g = 0, sum_gx = 0;
      for (int64_t i = 0; i < width; ++i) {
        const double w = weight ? static_cast<double>(weight[i]) : 1.0;
        sum_g += w * g[i];
        sum_gx += w * gx[i];
      }
      if (weight) weight += width;
      means[0] = sum_g * share;
      means[1] = sum_gx * share;
    }
  }

  // Adds what the sums of a block say about the parameters, for the channels [first, last).
  void add_totals(int64_t block, int64_t first, int64_t last, const double* g, const double* gx,
                  const ChannelTotals& totals) const {
    for (int64_t c = first; totals.g && c < last; ++c) totals.g[c] += g[c - first];
    for (int64_t c = first; totals.gx && c < last; ++c) totals.gx[c] += gx[c - first];
    for (int64_t c = first; totals.gs && c < last; ++c) {
      double scale = p.weight ? static_cast<double>(static_cast<const C*>(p.weight)[c]) : 1.0;
      if (statistics.rows) {
        const int64_t k = statistics.row_of(block) * groups + c / width;
        scale *= reciprocal_deviation(static_cast<double>(statistics.variance[k]), p.eps);
      }
      totals.gs[c] += g[c - first] * scale;
    }
  }

  void gradient(const double* means) const {
    const ChannelKernel pass = kernel(p.gradient != nullptr);
    const PieceCoefficients<C> coefficients(p, statistics, means);
    const auto body = [&](int64_t row, int64_t count, int64_t sample) {
      ChannelRows work = p.view(row, count);
      work.coefficients = coefficients.of(sample, row - sample * p.rows, count);
      p.run(pass, work);
    };
    for_each_piece(p, coefficients.shared() && p.by == By::column, body);
  }

  // ---- a group or a sample at a time ----

  // Whether g is kept between the passes, not made again: where it costs more than a comparison.
  bool keeps() const { return p.through() || p.stages.threshold; }

  C* kept(int64_t size) const {
    return keeps() ? static_cast<C*>(
                         thread_buffer(kGradientSlot, sizeof(C) * static_cast<size_t>(size)))
                   : nullptr;
  }

  void small_by_row(double* sums) const {
    const ChannelKernel first_pass =
        p.kernels->sums[static_cast<int>(p.storage)][static_cast<int>(By::row)][p.through()];
    const ChannelKernel second_pass = kernel(keeps());
    for_each_groups(p, [&](int64_t sample, int64_t first_group, int64_t last_group) {
      const int64_t first = first_group * width, last = last_group * width;
      CoefficientArrays<C> own(p, kOwnSlot, last - first);
      own.fill(statistics, sample, first, last);
      ChannelRows work = p.view_groups(sample, first_group, last_group);
      double* const of_rows = double_buffer(kOwnPartialSlot, 4 * work.rows);
      work.coefficients = own.from(0);
      work.gradient = kept(work.rows * p.cols);
      work.sums = of_rows;
      void* const dz = std::exchange(work.out, nullptr);
      first_pass(p.stages, work);
      work.out = dz;
      double *const g = sums + 2 * sample * channels + first, *const gx = g + channels;
      for (int64_t i = 0; i < work.rows; ++i) {
        const int64_t channel = p.is_batch() ? 0 : i;
        const bool more = i > channel;
        g[channel] = of_rows[2 * i] + (more ? g[channel] : 0);
        gx[channel] = of_rows[2 * i + 1] + (more ? gx[channel] : 0);
      }
      normalize_sums(p, statistics, sample, first, last, g, gx);
      double* const means = of_rows + 2 * work.rows;
      fill_means(sample, first_group, last_group, g, gx, means);
      own.fill_gradient(statistics, means, sample, first, last);
      second_pass(p.stages, work);
    });
  }

  // Samples whose totals are made together.
  int64_t samples_of_piece() const { return std::max<int64_t>(1, kPiece / (p.rows * p.cols)); }
  int64_t sample_pieces() const {
    return (p.samples + samples_of_piece() - 1) / samples_of_piece();
  }

  // Leaves 2 · channels doubles for each piece of samples: the totals g and gx.
  void small_by_column(double* partial) const {
    const int64_t per_piece = samples_of_piece();
    const ChannelKernel second_pass = kernel(keeps());
    parallel_for(0, sample_pieces(), 1, [&](int64_t begin, int64_t end) {
      CoefficientArrays<C> own(p, kOwnSlot, channels);
      double* const sums = double_buffer(kOwnPartialSlot, 2 * (channels + groups));
      double* const means = sums + 2 * channels;
      C* const gradient = kept(p.rows * p.cols);
      for (int64_t piece = begin; piece < end; ++piece) {
        double* const of_piece = partial + piece * 2 * channels;
        std::fill_n(of_piece, 2 * channels, 0.0);
        const int64_t last = std::min(p.samples, (piece + 1) * per_piece);
        for (int64_t sample = piece * per_piece; sample < last; ++sample) {
          own.fill(statistics, sample, 0, channels);
          std::fill_n(sums, 2 * channels, 0.0);
          ChannelRows work = p.view(sample * p.rows, p.rows);
          work.coefficients = own.from(0);
          work.gradient = gradient;
          for (int64_t row = 0; row < p.rows; row += p.rows_of_piece()) {
            ChannelRows part = work;
            p.advance(part, row * p.cols, static_cast<uint64_t>(row * p.row_counters));
            if (part.mask) part.mask += row;
            part.rows = std::min(p.rows - row, p.rows_of_piece());
            part.out = nullptr;
            add_column_sums<C>(p, part, sums);
          }
          normalize_sums(p, statistics, sample, 0, channels, sums, sums + channels);
          fill_means(sample, 0, groups, sums, sums + channels, means);
          own.fill_gradient(statistics, means, sample, 0, channels);
          p.run(second_pass, work);
          add_totals(sample, 0, channels, sums, sums + channels,
                     {of_piece, of_piece + channels, nullptr});
        }
      }
    });
  }
};

}  // namespace

template <class C>
void channel_gradient(const ChannelProblem& p, const ChannelStatistics<C>& statistics,
                      const C* present, const double* sums) {
  if (!p.elements()) return;
  const Backward<C> backward{p, statistics, present};
  const int64_t blocks = statistics.rows, groups = p.groups;
  const SharedDoubles buffer(kMeansSlot, 2 * blocks * groups);
  double* const means = buffer.data();
  for (int64_t block = 0; block < blocks; ++block) {
    const double* const g = sums + 2 * block * p.channels;
    backward.fill_means(block, 0, groups, g, g + p.channels, means + 2 * block * groups);
  }
  backward.gradient(means);
}

template <class C>
void channel_backward(const ChannelProblem& p, const ChannelStatistics<C>& statistics,
                      const C* present, bool constant, const ChannelTotals& totals) {
  const Backward<C> backward{p, statistics, present};
  const bool wanted = totals.g || totals.gx || totals.gs;
  const int64_t channels = p.channels;
  for (double* const total : {totals.g, totals.gx, totals.gs}) {
    if (total) std::fill_n(total, channels, 0.0);
  }
  if (!p.elements()) return;
  const int64_t bytes = (p.shortcut ? 4 : 2) * p.element_size();
  const bool small = !constant && statistics.rows == p.blocks() &&
                     is_small(p, bytes + (backward.keeps() ? sizeof(C) : 0));
  if (small && p.by == By::column) {
    const int64_t pieces = backward.sample_pieces();
    const SharedDoubles buffer(kPartialSlot, 2 * channels * pieces);
    backward.small_by_column(buffer.data());
    for (int64_t piece = 0; wanted && piece < pieces; ++piece) {
      const double* const g = buffer.data() + piece * 2 * channels;
      backward.add_totals(0, 0, channels, g, g + channels, totals);
    }
    return;
  }
  const int64_t blocks = std::max<int64_t>(1, statistics.rows);
  const bool needed = wanted || !constant;
  const SharedDoubles buffer(kSumsSlot, needed ? 2 * blocks * channels : 0);
  double* const sums = needed ? buffer.data() : nullptr;
  if (small) {
    backward.small_by_row(sums);
  } else if (constant) {
    channel_sums(p, statistics, sums);
  } else {
    ChannelProblem first = p, second = p.dshortcut ? behind_shortcut(p) : p;
    const KeptGradient<C> kept(p, backward.keeps() && !p.dshortcut);
    first.gradient = second.gradient = kept.data();
    first.out = nullptr;
    channel_sums(first, statistics, sums);
    channel_gradient(second, statistics, present, sums);
  }
  if (!wanted) return;
  parallel_for(0, channels, std::max<int64_t>(1, kGrain / 4 / blocks),
               [&](int64_t begin, int64_t end) {
                 for (int64_t block = 0; block < blocks; ++block) {
                   const double* const g = sums + 2 * block * channels + begin;
                   backward.add_totals(block, begin, end, g, g + channels, totals);
                 }
               });
}

#define FUSED_INSTANTIATE(C)                                                                   \
  template void channel_gradient(const ChannelProblem&, const ChannelStatistics<C>&, const C*, \
                                 const double*);                                               \
  template void channel_backward(const ChannelProblem&, const ChannelStatistics<C>&, const C*, \
                                 bool, const ChannelTotals&);
FUSED_INSTANTIATE(float)
FUSED_INSTANTIATE(double)
#undef FUSED_INSTANTIATE

}  // namespace fused
