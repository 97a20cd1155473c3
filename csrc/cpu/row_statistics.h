// What the row kernels share: loads and stores of a row's elements, and the statistics of rows.
#pragma once

#include <algorithm>

#include "pack.h"
#include "row.h"
// After pack.h: its templates need the functions of the vector type declared.
#include "../norm.h"

namespace fused::FUSED_TARGET {

// What does not depend on the activation, compiled once per storage type.
template <class T>
struct RowBase : Packs<T> {
  using Packs<T>::array;
  using typename Packs<T>::C;
  using typename Packs<T>::V;

  static bool must_copy(const RowProblem& problem) { return !std::is_same_v<T, C> || problem.bias; }

  template <class N>
  static V load_input(const T* z, const C* bias, int64_t i, N n) {
    V x = load(z + i, n);
    if (bias) x += load(bias + i, n);
    return x;
  }

  // Rows whose statistics are taken together, so that the chain from a sum to its use is waited for
  // once; the scratch holds their copies, which stay in the first-level cache.
  static int64_t batch_rows(int64_t cols) {
    return std::clamp<int64_t>(kBatchElements / cols, 1, kMostBatchRows);
  }

  // The statistics of rows [begin, end), at most batch_rows, into mean and rstd of the problem.
  // Where a row is not of the compute type, or a bias is to be added, scratch is filled with what
  // later passes read instead of z, cols elements a row.
  [[gnu::noinline]] static void statistics(const RowForward& problem, int64_t begin, int64_t end,
                                           C* const scratch) {
    const C* const bias = array(problem.bias);
    const bool copy = must_copy(problem), centered = problem.norm == Norm::layer;
    const int64_t cols = problem.cols, stride = problem.z_stride;
    const T* const z = static_cast<const T*>(problem.z);
    const double eps = problem.eps;
    C *const mean = static_cast<C*>(problem.mean), *const rstd = static_cast<C*>(problem.rstd);
    const C inverse = C(1) / static_cast<C>(cols);
    const V share = broadcast<V>(inverse);
    V sum, square;
    // Each term is divided by cols before it is added: values near the largest float do not
    // overflow the mean.
    for (int64_t row = begin; row < end; ++row) {
      const T* const in = z + row * stride;
      C* const out = scratch + (row - begin) * cols;
      if (centered) {
        accumulate<V>(cols, sum, square, [=](int64_t i, auto n, V& s, V&) FUSED_INLINE {
          const V x = load_input(in, bias, i, n);
          if (copy) store(out + i, x, n);
          s += x * share;
        });
        mean[row] = sum_lanes(sum);
      } else {
        accumulate<V>(cols, sum, square, [=](int64_t i, auto n, V&, V& q) FUSED_INLINE {
          const V x = load_input(in, bias, i, n);
          if (copy) store(out + i, x, n);
          q += x * x * share;
        });
        rstd[row] = sum_lanes(square);
      }
    }
    // Corrected two-pass: Chan, Golub and LeVeque, "Algorithms for computing the sample variance",
    // 1983. The mean of the differences repairs the rounding of the first mean.
    for (int64_t row = begin; centered && row < end; ++row) {
      const T* const in = z + row * stride;
      const C* const out = scratch + (row - begin) * cols;
      const C first = mean[row];
      const V center = broadcast<V>(first);
      accumulate<V>(cols, sum, square, [=](int64_t i, auto n, V& s, V& q) FUSED_INLINE {
        const V x = copy ? load(out + i, n) : load_input(in, bias, i, n);
        const V d = first_lanes(x - center, n);
        s += d;
        q += d * d;
      });
      const C shift = sum_lanes(sum) * inverse;
      const C variance = sum_lanes(square) * inverse - shift * shift;
      mean[row] = first + shift;
      rstd[row] = variance < C(0) ? C(0) : variance;
    }
    // By itself: square root and division of one row do not wait for those of another.
    for (int64_t row = begin; row < end; ++row) {
      rstd[row] = static_cast<C>(1.0 / std::sqrt(static_cast<double>(rstd[row]) + eps));
    }
  }
};

}  // namespace fused::FUSED_TARGET
