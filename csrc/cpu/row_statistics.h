// What the row kernels share: loads and stores of a row's elements, and the statistics of rows.
#pragma once

#include <algorithm>

#include "math.h"
#include "random.h"
#include "row.h"
// After math.h: its templates need the functions of the vector type declared.
#include "../norm.h"

namespace fused::FUSED_TARGET {

// Σ term(i, lanes) over the row, for two terms at once; term gives zero in absent lanes.
template <class V, class F>
FUSED_INLINE inline void accumulate(int64_t cols, V& first, V& second, const F& term) {
  // Independent sums hide the latency of addition, and shorten the chain of roundings; one double
  // at a time needs more of them for that.
  constexpr int kLanes = kLanesOf<V>, kAccumulators = kLanes == 1 ? 16 : 4;
  // One by one and unrolled: as a whole they would be kept, and cleared, in memory.
  V sums[kAccumulators][2];
#pragma GCC unroll 16
  for (int k = 0; k < kAccumulators; ++k) sums[k][0] = sums[k][1] = V{};
  int64_t i = 0;
  for (; i + kAccumulators * kLanes <= cols; i += kAccumulators * kLanes) {
#pragma GCC unroll 16
    for (int k = 0; k < kAccumulators; ++k) {
      term(i + k * kLanes, All<V>{}, sums[k][0], sums[k][1]);
    }
  }
  for_each_vector<V>(i, cols,
                     [&](int64_t j, auto n) FUSED_INLINE { term(j, n, sums[0][0], sums[0][1]); });
#pragma GCC unroll 4
  for (int half = kAccumulators / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int k = 0; k < half; ++k) {
      sums[k][0] += sums[k + half][0];
      sums[k][1] += sums[k + half][1];
    }
  }
  first = sums[0][0];
  second = sums[0][1];
}

// What does not depend on the activation, compiled once per storage type.
template <class T>
struct RowBase {
  using C = Compute<T>;
  using V = Vector<C>;
  static constexpr int kLanes = kLanesOf<V>;

  // A pack is what a kernel works on at a time: vectors enough to hide each other's latency and to
  // share the branches on what is present.
  static constexpr int kVectors = 4, kPack = kVectors * kLanes;
  static_assert(kRandomBlock % kPack == 0);

  // Calls body(i, vectors, lanes) over a row: whole packs, then single vectors.
  template <class F>
  FUSED_INLINE static void for_each_pack(int64_t cols, const F& body) {
    int64_t i = 0;
    for (; i + kPack <= cols; i += kPack) {
      body(i, std::integral_constant<int, kVectors>{}, All<V>{});
    }
#if FUSED_AVX512
    // A masked vector costs what a whole one does, and one body less is compiled.
    constexpr bool kWhole = kLanes == 1;
#else
    constexpr bool kWhole = true;
#endif
    if constexpr (kWhole) {
      for (; i + kLanes <= cols; i += kLanes) {
        body(i, std::integral_constant<int, 1>{}, All<V>{});
      }
    }
    if constexpr (kLanes > 1) {
      for (; i < cols; i += kLanes) {
        body(i, std::integral_constant<int, 1>{},
             static_cast<int>(std::min<int64_t>(kLanes, cols - i)));
      }
    }
  }

  // A per-column or per-row array, null where absent.
  static const C* array(const void* p) { return static_cast<const C*>(p); }

  static bool must_copy(const RowProblem& problem) { return !std::is_same_v<T, C> || problem.bias; }

  template <class N>
  static V load_input(const T* z, const C* bias, int64_t i, N n) {
    V x = load(z + i, n);
    if (bias) x += load(bias + i, n);
    return x;
  }

  template <class N>
  static void add_to(C* sum, int64_t i, V x, N n) {
    store(sum + i, load(sum + i, n) + x, n);
  }

  template <class N>
  static void store_output(T* p, V x, N n, bool streaming) {
    if (std::is_same_v<N, All<V>> && streaming) {
      store_streaming(p, x);
    } else {
      store(p, x, n);
    }
  }

  // Asks for what is read a row or more later; the hardware prefetcher stops at page ends.
  static void prefetch_pack(const T* p) {
    constexpr int kPerLine = 64 / sizeof(T);
    for (int i = 0; i < kPack; i += kPerLine) __builtin_prefetch(p + i, 0, 2);
  }

  static V dropout_scale(uint32_t threshold) {
    return broadcast<V>(threshold < 65536 ? 65536.0 / (65536.0 - threshold) : 0.0);
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
