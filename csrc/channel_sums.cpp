// The sums of backward: of g and g·x̂ over the positions of each channel, of all samples or apart.
//
// They are taken of pieces that depend on the shape alone and added in order, in double.
#include "channel.h"

namespace fused {
namespace {

ChannelKernel sums_kernel(const ChannelProblem& p) {
  return p.kernels->sums[static_cast<int>(p.storage)][static_cast<int>(p.by)][p.through()];
}

// As a function: GCC 12 takes the way to float and back for nothing where it makes a vector of two.
template <class C>
[[gnu::noinline]] double rounded(double x) {
  return static_cast<double>(static_cast<C>(x));
}

template <class C>
void sums_by_row(const ChannelProblem& p, const ChannelStatistics<C>& statistics, double* sums) {
  const int64_t pieces = (p.cols + kPiece - 1) / kPiece, rows = p.all_rows();
  const SharedDoubles buffer(kPartialSlot, sums ? 2 * rows * pieces : 0);
  double* const partial = sums ? buffer.data() : nullptr;
  const ChannelKernel kernel = sums_kernel(p);
  const PieceCoefficients<C> coefficients(p, statistics);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::min(p.cols, kPiece));
  parallel_for(0, rows * pieces, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / pieces, sample = row / p.channels, first = row % p.channels;
      // As many rows as the sample has left, or one piece of a long row.
      const int64_t count = pieces == 1 ? std::min(end - begin, p.channels - first) : 1;
      const int64_t start = begin % pieces * kPiece;
      ChannelRows work = pieces == 1 ? p.view(row, count)
                                     : p.view_part(row, start, std::min(kPiece, p.cols - start));
      work.coefficients = coefficients.of(sample, first, count);
      work.sums = partial ? partial + 2 * begin : nullptr;
      kernel(p.stages, work);
      begin += count;
    }
  });
  if (!sums) return;
  const bool apart = statistics.rows > 1;
  const int64_t of_one = apart ? 1 : p.samples, count = apart ? rows : p.channels;
  parallel_for(0, count, std::max<int64_t>(1, kGrain / 16 / of_one),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   double g = 0, gd = 0;
                   for (int64_t sample = 0; sample < of_one; ++sample) {
                     const double* next = partial + 2 * (i + sample * p.channels) * pieces;
                     for (int64_t piece = 0; piece < pieces; ++piece, next += 2) {
                       g += next[0];
                       gd += next[1];
                     }
                   }
                   double* const out = sums + 2 * (i - i % p.channels) + i % p.channels;
                   out[0] = g;
                   out[p.channels] = gd;
                 }
               });
}

template <class C>
void sums_by_column(const ChannelProblem& p, const ChannelStatistics<C>& statistics, double* sums) {
  // Pieces of a sample where its coefficients are its own, else of all rows.
  const PieceCoefficients<C> coefficients(p, statistics);
  const int64_t blocks = coefficients.shared() ? 1 : p.samples, rows = p.all_rows() / blocks;
  const int64_t per_piece = p.rows_of_piece();
  const int64_t pieces = (rows + per_piece - 1) / per_piece, size = 2 * p.channels;
  const SharedDoubles buffer(kPartialSlot, sums ? blocks * pieces * size : 0);
  double* const partial = sums ? buffer.data() : nullptr;
  const int64_t grain = std::max<int64_t>(1, kGrain / (std::min(rows, per_piece) * p.cols));
  parallel_for(0, blocks * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / pieces, first = i % pieces * per_piece;
      ChannelRows work = p.view(sample * rows + first, std::min(per_piece, rows - first));
      work.coefficients = coefficients.of(sample, first, work.rows);
      if (partial) std::fill_n(partial + i * size, size, 0.0);
      add_column_sums<C>(p, work, partial ? partial + i * size : nullptr);
    }
  });
  if (!sums) return;
  const int64_t kinds = statistics.rows > 1 ? p.samples : 1, of_one = blocks * pieces / kinds;
  for (int64_t block = 0; block < kinds; ++block) {
    double* const out = sums + block * size;
    const double* const first = partial + block * of_one * size;
    parallel_for(0, size, std::max<int64_t>(64, kGrain / of_one), [&](int64_t begin, int64_t end) {
      std::copy(first + begin, first + end, out + begin);
      for (int64_t piece = 1; piece < of_one; ++piece) {
        const double* const next = first + piece * size;
        for (int64_t i = begin; i < end; ++i) out[i] += next[i];
      }
    });
  }
}

}  // namespace

template <class C>
void add_column_sums(const ChannelProblem& p, ChannelRows& work, double* sums) {
  const int64_t most = p.fold * p.cols;
  if (sums) {
    work.sums = double_buffer(kColumnSlot, 2 * most);
    work.scratch = thread_buffer(kKernelSlot, 2 * sizeof(C) * static_cast<size_t>(most));
  }
  p.run_lines(sums_kernel(p), work, [&](int64_t cols) {
    for (int64_t which = 0; sums && which < 2; ++which) {
      double* const out = sums + which * p.channels;
      for (int64_t i = 0; i < cols; i += p.cols) {
        const double* next = work.sums + which * cols + i;
        if (p.inner == 1) {
          for (int64_t channel = 0; channel < p.channels; ++channel) out[channel] += next[channel];
          continue;
        }
        for (int64_t channel = 0; channel < p.channels; ++channel, next += p.inner) {
          double sum = 0;
          for (int64_t k = 0; k < p.inner; ++k) sum += next[k];
          out[channel] += sum;
        }
      }
    }
  });
}

template <class C>
void normalize_sums(const ChannelProblem& p, const ChannelStatistics<C>& statistics, int64_t block,
                    int64_t first, int64_t last, double* g, double* gd) {
  if (!statistics.rows) return;
  const int64_t width = p.width(), row = statistics.row_of(block) * p.groups;
  for (int64_t group = first / width; group * width < last; ++group) {
    const double variance = static_cast<double>(statistics.variance[row + group]);
    const double rstd = static_cast<C>(reciprocal_deviation(variance, p.eps));
    const int64_t end = std::min(last, (group + 1) * width);
    for (int64_t c = std::max(first, group * width); c < end; ++c) {
      // Zero, where the sum may have overflowed.
      gd[c - first] = rstd == 0 ? 0 : gd[c - first] * rstd;
    }
  }
  // As channel_sums and channel_gradient exchange them.
  for (int64_t i = 0; p.is_batch() && i < last - first; ++i) {
    g[i] = rounded<C>(g[i]);
    gd[i] = rounded<C>(gd[i]);
  }
}

template <class C>
void channel_sums(const ChannelProblem& p, const ChannelStatistics<C>& statistics, double* sums) {
  const int64_t blocks = std::max<int64_t>(1, statistics.rows), channels = p.channels;
  if (!p.elements()) {
    if (sums) std::fill_n(sums, 2 * blocks * channels, 0.0);
    return;
  }
  p.by == By::row ? sums_by_row(p, statistics, sums) : sums_by_column(p, statistics, sums);
  for (int64_t block = 0; sums && block < blocks; ++block) {
    double* const g = sums + 2 * block * channels;
    normalize_sums(p, statistics, block, 0, channels, g, g + channels);
  }
}

#define FUSED_INSTANTIATE(C)                                                                \
  template void add_column_sums<C>(const ChannelProblem&, ChannelRows&, double*);           \
  template void normalize_sums(const ChannelProblem&, const ChannelStatistics<C>&, int64_t, \
                               int64_t, int64_t, double*, double*);                         \
  template void channel_sums(const ChannelProblem&, const ChannelStatistics<C>&, double*);
FUSED_INSTANTIATE(float)
FUSED_INSTANTIATE(double)
#undef FUSED_INSTANTIATE

}  // namespace fused
