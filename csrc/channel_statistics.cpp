// The statistics of batch, group and instance norm.
//
// They are taken of pieces, and the pieces are merged in order and in double (Chan, Golub and
// LeVeque, 1983). The pieces depend on the shape alone, so the bits do not change with the number
// of threads, nor with whether a piece is normalised right after it.
#include <cstring>

#include "channel.h"

namespace fused {
namespace {

// Bytes that a second pass of the same thread finds in its second-level cache.
constexpr int64_t kCached = 512 << 10;

// Merges moments of `size` elements into those of `before` elements.
void merge(Moments& all, const Moments& next, double before, double size) {
  const double part = size / (before + size), difference = next.mean - all.mean;
  all.mean += difference * part;
  all.square += next.square + difference * difference * part * before;
}

// ---- contiguous runs: By::row, or one row to a sample ----

// A statistic of group or instance norm is one run; of batch norm, one run for each sample.
struct Runs {
  explicit Runs(const ChannelProblem& p)
      : count(p.samples * p.groups),
        size(p.rows * p.cols / std::max<int64_t>(1, p.groups)),
        pieces((size + kPiece - 1) / kPiece) {}
  int64_t count, size, pieces;  // pieces of a run
};

// The pieces of the runs [first, last), every `step`-th of them.
void run_pieces(const ChannelProblem& p, const Runs& runs, int64_t first, int64_t count,
                int64_t step, Moments* out) {
  const MomentsKernel kernel = p.kernels->moments[static_cast<int>(p.storage)];
  if (runs.pieces == 1) {
    kernel(p.z_at(first * runs.size), count, runs.size, step * runs.size, out);
    return;
  }
  for (int64_t run = 0; run < count; ++run) {
    for (int64_t piece = 0; piece < runs.pieces; ++piece) {
      const int64_t begin = piece * kPiece, size = std::min(kPiece, runs.size - begin);
      kernel(p.z_at((first + run * step) * runs.size + begin), 1, size, 0, out++);
    }
  }
}

// Merges the pieces of `count` runs, every `step`-th, into one statistic.
template <class C>
void merge_runs(const Runs& runs, const Moments* pieces, int64_t count, int64_t step, C* mean,
                C* variance) {
  Moments all{0, 0};
  double before = 0;
  for (int64_t run = 0; run < count; ++run) {
    for (int64_t piece = 0; piece < runs.pieces; ++piece) {
      const double size = static_cast<double>(std::min(kPiece, runs.size - piece * kPiece));
      const Moments& next = pieces[run * step * runs.pieces + piece];
      if (before == 0) {
        all = next;
      } else {
        merge(all, next, before, size);
      }
      before += size;
    }
  }
  *mean = static_cast<C>(all.mean);
  *variance = static_cast<C>(all.square / before);
}

template <class C>
void statistics_by_runs(const ChannelProblem& p, C* mean, C* variance) {
  const Runs runs(p);
  const SharedDoubles buffer(kPartialSlot, 2 * runs.count * runs.pieces);
  Moments* const pieces = reinterpret_cast<Moments*>(buffer.data());
  parallel_for(0, runs.count, std::max<int64_t>(1, kGrain / runs.size),
               [&](int64_t begin, int64_t end) {
                 run_pieces(p, runs, begin, end - begin, 1, pieces + begin * runs.pieces);
               });
  const int64_t blocks = p.blocks(), step = p.is_batch() ? p.groups : 1;
  const int64_t of_one = p.is_batch() ? p.samples : 1;
  parallel_for(0, blocks * p.groups, std::max<int64_t>(1, kGrain / 16 / of_one),
               [&](int64_t begin, int64_t end) {
                 for (int64_t k = begin; k < end; ++k) {
                   merge_runs(runs, pieces + k * runs.pieces, of_one, step, mean + k, variance + k);
                 }
               });
}

// ---- columns ----

// Mean and Σ(z − mean)² of the groups over rows [row, row + count), into two arrays one after the
// other; the number of rows that are present.
int64_t column_piece(const ChannelProblem& p, int64_t row, int64_t count, double* out) {
  const int64_t groups = p.groups, width = p.cols / groups;
  const int64_t present = p.present(row, count);
  if (!present) return 0;
  const int64_t most = p.fold * p.cols;
  double* const mean = static_cast<double*>(
      thread_buffer(kColumnSlot, sizeof(double) * static_cast<size_t>(2 * most)));
  double* const square = mean + most;
  void* const scratch = thread_buffer(kKernelSlot, sizeof(double) * static_cast<size_t>(3 * most));
  const ColumnMomentsKernel kernel = p.kernels->column_moments[static_cast<int>(p.storage)];
  const bool* const mask = p.mask ? p.mask + row : nullptr;
  int64_t before = 0;
  // Whole lines, then the rest of the rows.
  for (const int64_t folded : {p.fold, count % p.fold}) {
    const int64_t lines = folded == p.fold ? count / p.fold : 1;
    if (!folded || !lines) continue;
    const int64_t of_column = p.mask ? present : lines;
    if (p.cols == groups && p.fold == 1) {  // a column is a group
      kernel(p.z_at(row * p.cols), mask, of_column, p.cols, out, out + groups, scratch);
      return present;
    }
    kernel(p.z_at((row + before) * p.cols), mask, of_column, folded * p.cols, mean, square,
           scratch);
    const double columns = static_cast<double>(folded * width);
    for (int64_t group = 0; group < groups; ++group) {
      Moments all{0, 0};
      for (int64_t k = 0; k < folded; ++k) {
        const double* const first = mean + k * p.cols + group * width;
        for (int64_t i = 0; i < width; ++i) all.mean += first[i];
      }
      all.mean /= columns;
      for (int64_t k = 0; k < folded; ++k) {
        const int64_t first = k * p.cols + group * width;
        for (int64_t i = first; i < first + width; ++i) {
          const double difference = mean[i] - all.mean;
          all.square += square[i] + difference * difference * static_cast<double>(of_column);
        }
      }
      if (before) {
        Moments earlier{out[group], out[groups + group]};
        merge(earlier, all, static_cast<double>(before * width),
              static_cast<double>(lines * folded * width));
        all = earlier;
      }
      out[group] = all.mean;
      out[groups + group] = all.square;
    }
    before += lines * folded;
  }
  return present;
}

// Merges the pieces of a block for the groups [first, last); leaves their moments in the first
// piece that is not empty.
template <class C>
void merge_columns(const ChannelProblem& p, double* partial, const int64_t* present, int64_t pieces,
                   int64_t first, int64_t last, C* mean, C* variance) {
  const int64_t groups = p.groups, width = p.cols / groups;
  double *all = nullptr, before = 0;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    if (!present[piece]) continue;
    double* const next = partial + piece * 2 * groups;
    const double size = static_cast<double>(present[piece] * width);
    const double part = size / (before + size), weight = part * before;
    for (int64_t k = first; all && k < last; ++k) {
      const double difference = next[k] - all[k];
      all[k] += difference * part;
      all[groups + k] += next[groups + k] + difference * difference * weight;
    }
    if (!all) all = next;
    before += size;
  }
  for (int64_t k = first; k < last; ++k) {
    mean[k] = static_cast<C>(all ? all[k] : 0);
    variance[k] = static_cast<C>(all ? all[groups + k] / before : 0);
  }
}

template <class C>
void statistics_by_columns(const ChannelProblem& p, C* mean, C* variance, C* present) {
  const int64_t blocks = p.blocks(), rows = p.all_rows() / blocks, groups = p.groups;
  const int64_t per_piece = p.rows_of_piece(), pieces = (rows + per_piece - 1) / per_piece;
  const SharedDoubles buffer(kPartialSlot, blocks * pieces * (2 * groups + 1));
  double* const partial = buffer.data();
  int64_t* const found = reinterpret_cast<int64_t*>(partial + blocks * pieces * 2 * groups);
  parallel_for(0, blocks * pieces,
               std::max<int64_t>(1, kGrain / (std::min(rows, per_piece) * p.cols)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t row = i / pieces * rows + i % pieces * per_piece;
                   const int64_t count = std::min(per_piece, rows - i % pieces * per_piece);
                   found[i] = column_piece(p, row, count, partial + i * 2 * groups);
                 }
               });
  for (int64_t block = 0; block < blocks; ++block) {
    double* const of_block = partial + block * pieces * 2 * groups;
    parallel_for(0, groups, std::max<int64_t>(1, kGrain / pieces), [&](int64_t begin, int64_t end) {
      merge_columns(p, of_block, found + block * pieces, pieces, begin, end, mean + block * groups,
                    variance + block * groups);
    });
    if (present) {
      int64_t all = 0;
      for (int64_t i = 0; i < pieces; ++i) all += found[block * pieces + i];
      present[block] = static_cast<C>(all * (p.cols / groups));
    }
  }
}

bool by_runs(const ChannelProblem& p) {
  return p.by == By::row || (p.rows == 1 && !p.is_batch() && !p.mask);
}

}  // namespace

template <class C>
void channel_statistics(const ChannelProblem& given, C* mean, C* variance, C* present) {
  // Dropout shall not change the order of the sums, and so the bits.
  ChannelProblem p = given;
  p.lay_out_rows(false);
  const int64_t count = p.blocks() * p.groups;
  if (!p.elements()) {
    std::fill_n(mean, count, C(0));
    std::fill_n(variance, count, C(0));
    if (present) std::fill_n(present, p.blocks(), C(0));
  } else if (by_runs(p)) {
    statistics_by_runs(p, mean, variance);
  } else {
    statistics_by_columns(p, mean, variance, present);
  }
}

bool is_small(const ChannelProblem& p, int64_t bytes_of_element) {
  if (p.by == By::column) return !p.is_batch() && p.rows * p.cols * bytes_of_element <= kCached;
  // Batch norm's rows lie apart: of short ones, what is fetched ahead would be fetched twice. And
  // dropped channels have other coefficients in each sample.
  const bool apart = p.is_batch() && (p.cols * bytes_of_element < 1024 || p.channel_threshold);
  const int64_t run = p.is_batch() ? p.cols : p.cols * p.width();
  const int64_t runs = p.is_batch() ? p.samples : 1;
  return !apart && run <= kPiece && run * runs * bytes_of_element <= kCached;
}

template <class C>
void statistics_of_groups(const ChannelProblem& p, int64_t sample, int64_t first, int64_t last,
                          C* mean, C* variance) {
  const Runs runs(p);
  const int64_t of_one = p.is_batch() ? p.samples : 1, count = last - first;
  Moments* const pieces = static_cast<Moments*>(
      thread_buffer(kColumnSlot, sizeof(Moments) * static_cast<size_t>(of_one * count)));
  const int64_t k = sample * p.groups + first;
  run_pieces(p, runs, k, of_one * count, p.is_batch() ? p.groups : 1, pieces);
  for (int64_t i = 0; i < count; ++i) {
    merge_runs(runs, pieces + i * of_one, of_one, 1, mean + k + i, variance + k + i);
  }
}

template <class C>
void statistics_of_sample(const ChannelProblem& p, int64_t sample, C* mean, C* variance,
                          C* present) {
  const int64_t groups = p.groups, per_piece = p.rows_of_piece();
  const int64_t pieces = (p.rows + per_piece - 1) / per_piece;
  double* const partial = double_buffer(kOwnPartialSlot, pieces * (2 * groups + 1));
  if (by_runs(p)) {
    const Runs runs(p);
    Moments* const moments = reinterpret_cast<Moments*>(partial);
    run_pieces(p, runs, sample * groups, groups, 1, moments);
    for (int64_t k = 0; k < groups; ++k) {
      merge_runs(runs, moments + k, 1, 1, mean + k, variance + k);
    }
    return;
  }
  int64_t* const found = reinterpret_cast<int64_t*>(partial + pieces * 2 * groups);
  int64_t all = 0;
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t first = i * per_piece, count = std::min(per_piece, p.rows - first);
    found[i] = column_piece(p, sample * p.rows + first, count, partial + i * 2 * groups);
    all += found[i];
  }
  merge_columns(p, partial, found, pieces, 0, groups, mean, variance);
  if (present) *present = static_cast<C>(all * (p.cols / groups));
}

#define FUSED_INSTANTIATE(C)                                                                    \
  template void channel_statistics(const ChannelProblem&, C*, C*, C*);                          \
  template void statistics_of_groups(const ChannelProblem&, int64_t, int64_t, int64_t, C*, C*); \
  template void statistics_of_sample(const ChannelProblem&, int64_t, C*, C*, C*);
FUSED_INSTANTIATE(float)
FUSED_INSTANTIATE(double)
#undef FUSED_INSTANTIATE

}  // namespace fused
