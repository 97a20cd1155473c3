// A problem of the channel operators: what the arguments are, and how memory is seen as rows.
//
// A row holds the positions of one channel (By::row), or all channels of a position (By::column).
// Few positions to a channel make rows that are too short for that: a sample is then one row of
// channels · positions, whose coefficients repeat for the positions of a channel. For the same
// reason, rows of few channels are taken several together, as one line.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "arguments.h"
#include "cpu/channel.h"
#include "parallel.h"
#include "philox.h"

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

// Doubles that all threads read: in a buffer of the calling thread, or if they are many, in memory
// that is freed.
class SharedDoubles {
 public:
  SharedDoubles(Slot slot, int64_t count) {
    constexpr int64_t kMost = 1 << 17;
    if (count > kMost) own_ = new_memory(sizeof(double) * static_cast<size_t>(count));
    data_ = own_ ? static_cast<double*>(own_.get()) : double_buffer(slot, count);
  }
  double* data() const { return data_; }

 private:
  std::shared_ptr<void> own_;
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
  Stages stages;

  By by;
  int64_t rows, cols;    // rows of a sample; elements of a row
  int64_t inner;         // consecutive elements of a row that are one channel's
  int64_t fold;          // rows to a line
  int64_t row_counters;  // counters of dropout to a row

  const void* z;
  const void* dy = nullptr;
  const void* residual = nullptr;
  const void* shortcut = nullptr;
  void* dshortcut = nullptr;
  void* out = nullptr;
  void* gradient = nullptr;    // g of all elements, kept from the sums to dz; null: made again
  const bool* mask = nullptr;  // of an empty tensor null, too
  bool has_mask = false;

  int through() const { return stages.through != Through::comparison; }
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

}  // namespace fused
