// Problems of the channel kernels, as Python fills them in (fused/cuda_library.py has the same
// fields).
//
// z is seen as rows of `cols` elements: of the positions of one channel of a sample, or where
// `last` of the channels of one position. A segment is what has statistics of its own: a sample, or
// all. Its rows are taken in chunks, without `last` each row in chunks of its own; what is summed
// first is a part: one chunk of a segment, or of a row of every channel. Parts are counted from
// segment to segment, so that arrays over parts are (segments, chunks of a segment).
#pragma once

#include <cstdint>

namespace fused::cuda {

// A pointer is null where a tensor is absent.
struct ChannelProblem {
  const void *z, *dy, *residual, *mask, *seed;
  const void*
      coefficients;  // (planes, segments, channels), in the compute type: as CoefficientPlane
  void* out;         // y, or dz; null where only sums are wanted
  void* partial;     // statistics: double (2, parts, channels), mean and Σ(z − mean)²;
                     // sums: (sums wanted, parts, channels) in the compute type
  void* counts;      // double (parts,): the elements of each channel of a part
  int64_t samples, channels, positions, last;
  int64_t segments, chunks;  // chunks: of a row; where `last` of a segment
  int64_t length;            // of a chunk: positions, a multiple of 8; where `last` rows
  int64_t storage, activation, threshold, channel_dropout;
  int64_t wanted;   // kWant bits (codes.h): the planes of partial, in this order
  int64_t centred;  // whether dz takes slope and offset
  double alpha, beta;
};

// From parts to statistics: mean and variance (segments, groups), count (segments,) or null, in
// float, or where `wide` in double.
struct StatisticsProblem {
  const void *partial, *counts;
  void *mean, *variance, *count;
  int64_t segments, chunks, channels, groups, wide;  // chunks: parts of a segment
};

// h = (z − mean)·scale + shift, and dz = g·scale + (z − mean)·slope + offset.
enum CoefficientPlane { kMean, kScale, kShift, kRstd, kSlope, kOffset };

// From statistics to coefficients. sums (2, segments, channels): of g and g·x̂, or null; count
// (segments,), or null: `elements` are behind each statistic. Each array has its storage type.
struct CoefficientProblem {
  const void *mean, *variance, *norm_weight, *norm_bias, *sums, *count;
  void* out;  // in float, or where `wide` in double
  int64_t mean_storage, variance_storage, weight_storage, bias_storage, sums_storage, count_storage;
  int64_t segments, groups, channels, elements, wide;
  double eps;
};

}  // namespace fused::cuda
