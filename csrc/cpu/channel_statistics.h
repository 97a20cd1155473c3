// Mean and Σ(z − mean)², of runs of contiguous elements and of columns.
//
// Corrected two-pass: Chan, Golub and LeVeque, "Algorithms for computing the sample variance",
// 1983. The mean of the differences repairs the rounding of the first mean. The second pass finds
// the elements in a cache.
#pragma once

#include "channel.h"
#include "pack.h"

namespace fused::FUSED_TARGET {

template <class T>
struct ChannelMoments : Packs<T> {
  using Base = Packs<T>;
  using Base::kLanes;
  using typename Base::C;
  using typename Base::V;

  // Elements that both passes find in the first-level cache, and whose sums are good in float.
  static constexpr int64_t kBlock = 4096;

  static Moments block(const T* z, int64_t n) {
    const C inverse = C(1) / static_cast<C>(n);
    const V share = broadcast<V>(inverse);
    V sum, square;
    // Each term is divided by n before it is added: values near the largest float do not overflow.
    accumulate<V>(n, sum, square, [=](int64_t i, auto lanes, V& s, V&) FUSED_INLINE {
      s += load(z + i, lanes) * share;
    });
    const C first = sum_lanes(sum);
    const V center = broadcast<V>(first);
    accumulate<V>(n, sum, square, [=](int64_t i, auto lanes, V& s, V& q) FUSED_INLINE {
      const V d = first_lanes(load(z + i, lanes) - center, lanes);
      s += d;
      q += d * d;
    });
    return corrected(first, sum_lanes(sum), sum_lanes(square), static_cast<double>(n));
  }

  // So few elements that adding up the lanes of vectors would cost more than they save.
  static constexpr int64_t kShort = 16;

  static double element(const T* p) {
    if constexpr (std::is_same_v<T, bfloat16>) {
      const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
      float value;
      memcpy(&value, &bits, 4);
      return static_cast<double>(value);
    } else if constexpr (std::is_same_v<T, float16>) {
      return static_cast<double>(load(p, 1)[0]);
    } else {
      return static_cast<double>(*p);
    }
  }

  static Moments of_few(const T* z, int64_t n) {
    double sum = 0, square = 0;
    for (int64_t i = 0; i < n; ++i) sum += element(z + i);
    const double mean = sum / static_cast<double>(n);
    for (int64_t i = 0; i < n; ++i) {
      const double d = element(z + i) - mean;
      square += d * d;
    }
    return {mean, square};
  }

  // From the first mean, the sum and the squares of the differences from it.
  static Moments corrected(double first, double sum, double square, double n) {
    // The sum may have overflowed where the squares have.
    if (!std::isfinite(square)) return {first, square};
    const double shift = sum / n;
    return {first + shift, std::max(square - sum * shift, 0.0)};
  }

  static void runs(const void* z, int64_t runs, int64_t n, int64_t stride, Moments* out) {
    if (n <= kShort) {
      for (int64_t run = 0; run < runs; ++run) {
        out[run] = of_few(static_cast<const T*>(z) + run * stride, n);
      }
      return;
    }
    for (int64_t run = 0; run < runs; ++run) {
      const T* const start = static_cast<const T*>(z) + run * stride;
      Moments all = block(start, std::min(n, kBlock));
      for (int64_t begin = kBlock; begin < n; begin += kBlock) {
        const double size = static_cast<double>(std::min(n - begin, kBlock));
        const Moments next = block(start + begin, static_cast<int64_t>(size));
        const double part = size / (static_cast<double>(begin) + size);
        const double difference = next.mean - all.mean;
        all.mean += difference * part;
        all.square += next.square + difference * difference * part * static_cast<double>(begin);
      }
      out[run] = all;
    }
  }

  // Calls body(rows) for arrays of kTogether rows that are present, then of single ones.
  static constexpr int kTogether = 4;
  template <class F>
  FUSED_INLINE static void each_rows(const T* z, const bool* mask, int64_t rows, int64_t cols,
                                     const F& body) {
    const T* found[kTogether];
    int count = 0;
    for (int64_t row = 0; row < rows; ++row) {
      if (mask && !mask[row]) continue;
      found[count++] = z + row * cols;
      if (count == kTogether) {
        body(found, std::integral_constant<int, kTogether>{});
        count = 0;
      }
    }
    for (int k = 0; k < count; ++k) body(found + k, std::integral_constant<int, 1>{});
  }

  static void columns(const void* z_, const bool* mask, int64_t rows, int64_t present, int64_t cols,
                      double* mean, double* square, void* scratch) {
    const T* const z = static_cast<const T*>(z_);
    C *const first = static_cast<C*>(scratch), *const sums = first + cols,
             *const squares = sums + cols;
    std::fill_n(first, 3 * cols, C(0));
    const V share = broadcast<V>(1.0 / static_cast<double>(present));
    each_rows(z, mask, rows, cols, [=](const T* const* row, auto count) FUSED_INLINE {
      for_each_vector<V>(0, cols, [=](int64_t i, auto n) FUSED_INLINE {
        V sum = load(first + i, n);
#pragma GCC unroll 4
        for (int k = 0; k < decltype(count)::value; ++k) sum += load(row[k] + i, n) * share;
        store(first + i, sum, n);
      });
    });
    each_rows(z, mask, rows, cols, [=](const T* const* row, auto count) FUSED_INLINE {
      for_each_vector<V>(0, cols, [=](int64_t i, auto n) FUSED_INLINE {
        const V center = load(first + i, n);
        V sum = load(sums + i, n), sum_of_squares = load(squares + i, n);
#pragma GCC unroll 4
        for (int k = 0; k < decltype(count)::value; ++k) {
          const V d = load(row[k] + i, n) - center;
          sum += d;
          sum_of_squares += d * d;
        }
        store(sums + i, sum, n);
        store(squares + i, sum_of_squares, n);
      });
    });
    const double n = static_cast<double>(present), inverse = 1 / n;
    for_each_vector<V>(0, cols, [=](int64_t i, auto lanes) FUSED_INLINE {
      store_doubles(mean + i, load(first + i, lanes), 1, lanes);
      store_doubles(square + i, load(squares + i, lanes), 1, lanes);
    });
    for (int64_t i = 0; i < cols; ++i) {
      const double shift = static_cast<double>(sums[i]) * inverse;
      const double rest = square[i] - shift * shift * n;
      if (!std::isfinite(square[i])) continue;
      mean[i] += shift;
      square[i] = std::max(rest, 0.0);
    }
  }
};

}  // namespace fused::FUSED_TARGET
