// A problem of the channel operators: what the arguments are, and how memory is seen as rows.
//
// A row holds the positions of one channel (By::row), or all channels of a position (By::column).
// Few positions to a channel make rows that are too short for that: a sample is then one row of
// channels · positions, whose coefficients repeat for the positions of a channel. For the same
// reason, rows of few channels are taken several together, as one line.
#pragma once

#include <algorithm>
#include <cstdint>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "arguments.h"
#include "cpu/channel.h"
#include "cpu/memory.h"

namespace fused {

// Elements that a thread works on at a time.
constexpr int64_t kPiece = 65536;

// Elements of small groups that are worked on together: a part of the first-level cache.
constexpr int64_t kTogether = 4096;

// Which buffers of a thread are in use (memory.h); 0 to 4 are also the row operators'.
enum Slot : int {
  kWeightSlot = 0,
  kBiasSlot = 1,
  kMeanSlot = 2,
  kKernelSlot = 3,
  kVarianceSlot = 4,
  kSharedSlot = 5,       // coefficients that all threads read
  kOwnSlot = 6,          // coefficients of one thread
  kPartialSlot = 7,      // partial results that other threads read
  kGradientSlot = 8,     // g between the two passes of backward
  kColumnSlot = 9,       // a kernel's results for columns
  kOwnPartialSlot = 10,  // partial results of one thread
  kSumsSlot = 11,        // sums of all blocks
  kMeansSlot = 12,       // and what they give each statistic
  kCountSlot = 13,
  kTotalsSlot = 14,  // what the parameters' gradients are made of
};

inline double* double_buffer(Slot slot, int64_t count) {
  return static_cast<double*>(thread_buffer(slot, sizeof(double) * static_cast<size_t>(count)));
}

// Doubles that all threads read: in a buffer of the calling thread, or if they are many, in a
// tensor that is freed.
class SharedDoubles {
 public:
  SharedDoubles(Slot slot, int64_t count) {
    constexpr int64_t kMost = 1 << 17;
    if (count > kMost) tensor_.emplace(new_tensor({count}, aoti_torch_dtype_float64()));
    data_ = tensor_ ? static_cast<double*>(tensor_->data_ptr()) : double_buffer(slot, count);
  }
  double* data() const { return data_; }

 private:
  OptionalTensor tensor_;
  double* data_;
};

struct ChannelScalars {
  int64_t norm, groups;
  bool channels_last;
  double eps;
  int64_t activation;
  double alpha, beta;
  int64_t threshold;
  bool channel_dropout;
};

struct ChannelProblem {
  ChannelProblem(const torch::stable::Tensor& z, const OptionalTensor& norm_weight,
                 const OptionalTensor& norm_bias, const OptionalTensor& mask,
                 const OptionalTensor& seed, const ChannelScalars& scalars);

  // Decides on `by` and what follows from it.
  void lay_out_rows(bool dropout);
  // Checks that a tensor is like z, and gives its data.
  void* data_like_z(const torch::stable::Tensor& tensor, const char* name) const;
  void set_out(const torch::stable::Tensor& tensor);

  Storage storage, compute;
  int64_t samples, channels, positions, groups;
  bool channels_last;
  Norm norm;
  double eps;
  const void *weight, *bias;  // of the norm, in the compute type; null where absent
  uint32_t channel_threshold = 0;

  const ChannelKernels* kernels;
  ChannelStages stages;
  int through;  // as Through

  By by;
  int64_t rows, cols;    // rows of a sample; elements of a row
  int64_t inner;         // consecutive elements of a row that are one channel's
  int64_t fold;          // rows to a line
  int64_t row_counters;  // counters of dropout to a row

  const void* z;
  const void* dy = nullptr;
  const void* residual = nullptr;
  void* out = nullptr;
  void* gradient = nullptr;    // g of all elements, kept from the sums to dz; null: made again
  const bool* mask = nullptr;  // of an empty tensor null, too
  bool has_mask = false;

  int64_t all_rows() const { return samples * rows; }
  int64_t element_size() const;
  int64_t elements() const { return samples * rows * cols; }
  // Samples whose statistics are apart, and channels that share one.
  int64_t blocks() const { return norm == Norm::group || norm == Norm::instance ? samples : 1; }
  int64_t width() const { return groups ? channels / groups : 0; }
  bool is_batch() const { return norm == Norm::batch; }

  // `count` rows from a row on, counted over all samples; or columns [start, start + size) of one.
  ChannelRows view(int64_t row, int64_t count) const;
  ChannelRows view_part(int64_t row, int64_t start, int64_t size) const;
  // By::row: the rows of groups of a sample; for batch norm, those of a channel in all samples.
  ChannelRows view_groups(int64_t sample, int64_t first, int64_t last) const;

  // Rows of By::column that one piece takes: whole lines, and few enough for sums in float.
  int64_t rows_of_piece() const {
    return fold * std::clamp<int64_t>(kPiece / std::max<int64_t>(1, fold * cols), 1, 256);
  }

  const void* z_at(int64_t element) const;
  int64_t present(int64_t row, int64_t count) const;  // rows that the mask leaves in

  // Calls kernel on rows, of By::column as lines.
  void run(ChannelKernel kernel, const ChannelRows& work) const {
    by == By::row ? kernel(stages, work) : run_lines(kernel, work, [](int64_t) {});
  }
  // Calls kernel on rows of By::column as lines, and after each call done(cols).
  template <class F>
  void run_lines(ChannelKernel kernel, const ChannelRows& given, const F& done) const {
    ChannelRows work = given;
    const int64_t lines = given.rows / fold, rest = given.rows % fold;
    if (lines) {
      work.rows = lines;
      work.cols = work.stride = fold * cols;
      work.row_counters = static_cast<uint64_t>(fold * row_counters);
      kernel(stages, work);
      done(work.cols);
    }
    if (rest) {
      advance(work, lines * fold * cols, static_cast<uint64_t>(lines * fold * row_counters));
      work.rows = 1;
      work.cols = work.stride = rest * cols;
      kernel(stages, work);
      done(work.cols);
    }
  }
  // Moves the pointers on; not those of a mask, with which lines are rows.
  void advance(ChannelRows& work, int64_t elements, uint64_t counters) const;
};

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

// ---- channel_statistics.cpp ----

// Mean and biased variance of every statistic; present: with a mask, the elements behind those of
// each block, else null.
template <class C>
void channel_statistics(const ChannelProblem& problem, C* mean, C* variance, C* present);

// Whether a thread can go over what is behind a statistic again while it is in the cache: a group
// (By::row; for batch norm, of all samples) or a sample (By::column).
bool is_small(const ChannelProblem& problem, int64_t bytes_of_element);

// The statistics of some of these, by the calling thread; into the arrays for all.
template <class C>
void statistics_of_groups(const ChannelProblem& problem, int64_t sample, int64_t first,
                          int64_t last, C* mean, C* variance);
template <class C>
void statistics_of_sample(const ChannelProblem& problem, int64_t sample, C* mean, C* variance,
                          C* present);

// Calls body(sample, first, last) by several threads for the groups [first, last) of a sample, of
// By::row and small: several together take fewer calls.
template <class F>
void for_each_groups(const ChannelProblem& problem, const F& body) {
  const int64_t groups = problem.groups, of_batch = problem.is_batch() ? problem.samples : 1;
  const int64_t size = problem.cols * problem.width() * of_batch;
  const int64_t together =
      problem.is_batch() ? 1 : std::clamp<int64_t>(kTogether / size, 1, groups);
  const int64_t pieces = (groups + together - 1) / together;
  torch::stable::parallel_for(0, problem.blocks() * pieces,
                              std::max<int64_t>(1, kGrain / (size * together)),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  const int64_t first = i % pieces * together;
                                  body(i / pieces, first, std::min(groups, first + together));
                                }
                              });
}

// ---- channel_forward.cpp ----

template <class C>
void channel_apply(const ChannelProblem& problem, const ChannelStatistics<C>& statistics);
template <class C>
void channel_forward(const ChannelProblem& problem, C* mean, C* variance, C* present);

// Calls body(first row, rows, sample) by several threads for all rows, in pieces of one sample, or
// where `joined`, of any. The pieces depend on the shape alone: so does then which elements are
// gone over as a pack, which may be rounded otherwise than single ones.
template <class F>
void for_each_piece(const ChannelProblem& problem, bool joined, const F& body) {
  const int64_t blocks = joined ? 1 : problem.samples, rows = problem.all_rows() / blocks;
  const int64_t line = problem.fold * problem.cols;
  const int64_t per_piece = problem.fold * std::max<int64_t>(1, kGrain / line);
  const int64_t pieces = (rows + per_piece - 1) / per_piece;
  const int64_t grain = std::max<int64_t>(1, kGrain / (std::min(rows, per_piece) * problem.cols));
  torch::stable::parallel_for(0, blocks * pieces, grain, [&](int64_t begin, int64_t end) {
    // Backwards: what was read last by the pass before is found in the caches.
    for (int64_t i = end; i-- > begin;) {
      const int64_t sample = i / pieces, first = i % pieces * per_piece;
      body(sample * rows + first, std::min(per_piece, rows - first), sample);
    }
  });
}

// ---- channel_sums.cpp ----

// For each block two arrays over the channels, Σ g and Σ g·x̂; for batch norm rounded to the compute
// type. If the problem has an out, it becomes dz = g·scale; sums: null where that is all that is
// wanted.
template <class C>
void channel_sums(const ChannelProblem& problem, const ChannelStatistics<C>& statistics,
                  double* sums);

// Adds Σ g and Σ g·(z − mean) over rows of By::column to two such arrays.
template <class C>
void add_column_sums(const ChannelProblem& problem, ChannelRows& work, double* sums);

// Makes Σ g·x̂ of Σ g·(z − mean), and rounds, for the channels [first, last) of a block; g and gd
// from the first one's on.
template <class C>
void normalize_sums(const ChannelProblem& problem, const ChannelStatistics<C>& statistics,
                    int64_t block, int64_t first, int64_t last, double* g, double* gd);

// ---- channel_backward.cpp ----

// What the parameters' gradients are made of, arrays of `channels`; null: not wanted.
struct ChannelTotals {
  double* g;   // Σ g over samples and positions
  double* gx;  // Σ g·x̂
  double* gs;  // Σ g·scale
};

// present: the elements behind the statistics of each block; null: as the shape says.
template <class C>
void channel_backward(const ChannelProblem& problem, const ChannelStatistics<C>& statistics,
                      const C* present, bool constant, const ChannelTotals& totals);

// dz from the sums of all blocks.
template <class C>
void channel_gradient(const ChannelProblem& problem, const ChannelStatistics<C>& statistics,
                      const C* present, const double* sums);

}  // namespace fused
