// What the row kernels share: what h is made of, and the statistics of rows.
#pragma once

#include <algorithm>

#include "pack.h"
#include "row.h"
// After pack.h: its templates need the functions of the vector type declared.
#include "../norm.h"

namespace fused::FUSED_TARGET {

// h = x̂·weight + shift + shortcut of a row, with x̂ = normalize(z + bias): the Input of epilogue.h.
template <class T>
struct RowInput : Packs<T> {
  using Packs<T>::each;
  using typename Packs<T>::C;
  using typename Packs<T>::V;

  template <int kCount, class N>
  FUSED_INLINE void load(V (&x)[kCount], int64_t start, N n) const {
    if (copy) {
      each(x, start,
           [&](int k, int64_t i) FUSED_INLINE { x[k] = FUSED_TARGET::load(copy + i, n); });
    } else {
      each(x, start, [&](int k, int64_t i) FUSED_INLINE { x[k] = FUSED_TARGET::load(z + i, n); });
      if (bias) {
        each(x, start,
             [&](int k, int64_t i) FUSED_INLINE { x[k] += FUSED_TARGET::load(bias + i, n); });
      }
    }
    if (normed) {
      each(x, start, [&](int k, int64_t) FUSED_INLINE { x[k] = normalize(x[k], statistics); });
    }
  }

  template <int kCount, class N>
  FUSED_INLINE void affine(V (&x)[kCount], int64_t start, N n) const {
    if (weight && shift) {
      each(x, start, [&](int k, int64_t i) FUSED_INLINE {
        x[k] = x[k] * FUSED_TARGET::load(weight + i, n) + FUSED_TARGET::load(shift + i, n);
      });
    } else if (weight) {
      each(x, start,
           [&](int k, int64_t i) FUSED_INLINE { x[k] *= FUSED_TARGET::load(weight + i, n); });
    } else if (shift) {
      each(x, start,
           [&](int k, int64_t i) FUSED_INLINE { x[k] += FUSED_TARGET::load(shift + i, n); });
    }
    Packs<T>::add(x, shortcut, start, n);
  }

  template <int kCount, class N>
  FUSED_INLINE void rescale(V (&)[kCount], int64_t, N) const {}
  static constexpr bool rescales() { return false; }

  bool gives_x() const { return normed; }

  // The input of the second half of the columns.
  FUSED_INLINE RowInput gates() const {
    RowInput second = *this;
    second.z = gate;
    second.ahead = gate_ahead;
    return second;
  }
  const T* plain() const { return normed || bias || weight || shift || shortcut ? nullptr : z; }

  const T *z, *ahead;
  const C* copy;  // of z + bias; null: it is made again
  const C *bias, *weight, *shift;
  bool normed;
  RowStatistics<V> statistics;
  const T *gate, *gate_ahead;  // z and ahead of the second half of the columns
  const T* shortcut;           // may be null
};

// What does not depend on the activation, compiled once per storage type.
template <class T>
struct RowBase : Packs<T> {
  using Packs<T>::array;
  using typename Packs<T>::C;
  using typename Packs<T>::V;

  static bool must_copy(const RowProblem& problem) { return !std::is_same_v<T, C> || problem.bias; }

  // The rows of the problem's shortcut, null where it has none.
  static const T* shortcut_of(const RowProblem& problem, int64_t row) {
    const T* const first = static_cast<const T*>(problem.shortcut);
    return first ? first + row * problem.cols : nullptr;
  }

  template <class N>
  static V load_input(const T* z, const C* bias, int64_t i, N n) {
    V x = load(z + i, n);
    if (bias) x += load(bias + i, n);
    return x;
  }

  template <class Problem>
  static RowStatistics<V> statistics_of(const Problem& problem, int64_t row) {
    const bool normed = problem.norm != Norm::none, centered = problem.norm == Norm::layer;
    return {broadcast<V>(centered ? array(problem.mean)[row] : C(0)),
            broadcast<V>(normed ? array(problem.rstd)[row] : C(1))};
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
