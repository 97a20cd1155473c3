// The structures that Python fills in for the launchers.
//
// Each describes itself: the library hands out the text of its declaration (errors.cu), of which
// fused/backends/cuda_library.py makes a structure of its own. So Python knows fields by name
// alone, in any order. A tensor named there also fills in <name>_storage, its code of
// ../cpu/codes.h, and <name>_stride, the elements from row to row, where there are such fields. A
// pointer is null where a tensor is absent.
#pragma once

#include <cstdint>

namespace fused::cuda {

template <class Problem>
constexpr const char* kDeclaration = "";

// Fields are const void*, void*, int64_t or double.
#define FUSED_STRUCTURE(Problem, ...) \
  struct Problem {                    \
    __VA_ARGS__                       \
  };                                  \
  template <>                         \
  inline constexpr const char* kDeclaration<Problem> = #__VA_ARGS__;

// clang-format off: it takes the lists for expressions.

// A problem of the row kernels, by the names of fused/backends/ops.py. Parameters have z's type or the
// compute type.
FUSED_STRUCTURE(RowProblem,
  const void *z, *dy, *residual, *bias, *norm_weight, *norm_bias, *seed;
  void *out;         // y, or dz
  void *statistics;  // (planes, rows), in the compute type: mean and rstd, or rstd
  void *means;       // (2, rows), in the compute type: of g and of g·x̂ along each row
  void *partial;     // (sums wanted, chunks, cols), in the compute type: of chunks of rows
  int64_t rows, cols, chunks, z_stride, dy_stride, residual_stride, out_stride;
  int64_t z_storage, bias_storage, norm_weight_storage, norm_bias_storage;
  int64_t norm, activation, threshold;
  int64_t wanted;    // kWant bits (../cpu/codes.h): the planes of partial, in this order
  double eps, alpha, beta;
)

// The second stage of sums: out<plane>[outer, cols] = Σ over chunks of partial[planes, outer,
// chunks, cols], which is of float or double.
FUSED_STRUCTURE(SumProblem,
  const void *partial;
  void *out0, *out1, *out2;
  int64_t planes, outer, chunks, cols;
  int64_t partial_storage, out0_storage, out1_storage, out2_storage;
)

// A problem of the channel kernels. z is seen as rows of `cols` elements: of the positions of one
// channel of a sample, or where `last` of the channels of one position. A segment is what has
// statistics of its own: a sample, or all. Its rows are taken in chunks, without `last` each row in
// chunks of its own; what is summed first is a part: one chunk of a segment, or of a row of every
// channel. Parts are counted from segment to segment, so that arrays over parts are (segments,
// chunks of a segment).
FUSED_STRUCTURE(ChannelProblem,
  const void *z, *dy, *residual, *mask, *seed;
  const void *coefficients;  // (planes, segments, channels), in the compute type: CoefficientPlane
  void *out;                 // y, or dz; null where only sums are wanted
  void *partial;             // statistics: double (2, parts, channels), mean and Σ(z − mean)²;
                             // sums: (sums wanted, parts, channels) in the compute type
  void *counts;              // double (parts,): the elements of each channel of a part
  int64_t samples, channels, positions, last;
  int64_t segments, chunks;  // chunks: of a row; where `last` of a segment
  int64_t length;            // of a chunk: positions, a multiple of 8; where `last` rows
  int64_t z_storage, activation, threshold, channel_dropout;
  int64_t wanted;            // kWant bits: the planes of partial, in this order
  int64_t centred;           // whether dz takes slope and offset
  double alpha, beta;
)

// From parts to statistics: mean and variance (segments, groups), count (segments,) or null.
FUSED_STRUCTURE(StatisticsProblem,
  const void *partial, *counts;
  void *mean, *variance, *count;
  int64_t mean_storage, variance_storage, count_storage;
  int64_t segments, chunks, channels, groups;  // chunks: parts of a segment
)

// From statistics to coefficients. sums (2, segments, channels): of g and g·x̂, or null; count
// (segments,), or null: `elements` are behind each statistic.
FUSED_STRUCTURE(CoefficientProblem,
  const void *mean, *variance, *norm_weight, *norm_bias, *sums, *count;
  void *out;
  int64_t mean_storage, variance_storage, norm_weight_storage, norm_bias_storage;
  int64_t sums_storage, count_storage, out_storage;
  int64_t segments, groups, channels, elements;
  double eps;
)

// h = (z − mean)·scale + shift, and dz = g·scale + (z − mean)·slope + offset.
enum CoefficientPlane { kMean, kScale, kShift, kRstd, kSlope, kOffset };

// The launchers and what they take.
#define FUSED_FOR_EACH_LAUNCHER(apply) \
  apply(row_forward, RowProblem) apply(row_backward, RowProblem) \
  apply(gated_forward, RowProblem) apply(gated_backward, RowProblem) \
  apply(channel_moments, ChannelProblem) apply(channel_merge, StatisticsProblem) \
  apply(channel_coefficients, CoefficientProblem) \
  apply(channel_forward, ChannelProblem) apply(channel_backward, ChannelProblem) \
  apply(sum, SumProblem)
// clang-format on

// A problem, the device's index (negative: the current one) and a stream; a cudaError_t comes back.
// A launcher that is defined with another problem does not compile.
#define FUSED_EXPORT extern "C" __attribute__((visibility("default")))
#define FUSED_LAUNCHER(name, Problem) \
  FUSED_EXPORT int fused_cuda_##name(const Problem* p, int device, void* stream);
FUSED_FOR_EACH_LAUNCHER(FUSED_LAUNCHER)
#undef FUSED_LAUNCHER

}  // namespace fused::cuda
