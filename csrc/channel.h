// The passes of the channel operators.
#pragma once

#include "channel_coefficients.h"

namespace fused {

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
  parallel_for(0, problem.blocks() * pieces, std::max<int64_t>(1, kGrain / (size * together)),
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
  parallel_for(0, blocks * pieces, grain, [&](int64_t begin, int64_t end) {
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
