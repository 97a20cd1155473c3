// Mean and Σ(z − mean)², of runs of contiguous elements and of columns.
//
// One pass over the differences from a first mean, corrected by their own mean: Chan, Golub and
// LeVeque, "Algorithms for computing the sample variance", 1983. The first mean is that of every
// seventh element or so, r of n. It is off by δ with n·δ² ≤ n/r · Σ(z − mean)² whatever the
// elements are, so the correction costs three bits of a float at worst, and near to none unless
// just these elements differ from the rest. (From a single element it would cost all of them if
// that is an outlier, and from the first ones, many if there is a step.) Two passes take 10 to 15 %
// longer forward (bfloat16, AMD EPYC 9004, one thread, November 2026). Because that first pass is
// strided, the pass before asks memory for its elements.
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

  // Elements whose sums are good in float.
  static constexpr int64_t kBlock = 4096;
  // Of so many, every one contributes to the first mean; else every kStep-th pack or row.
  static constexpr int64_t kAll = 512, kAllRows = 16, kStep = 7;

  // Asks for what lies `ahead` of an element, in the next block or piece, if a line begins there:
  // so that its strided first pass finds it in a cache.
  FUSED_INLINE static void prefetch_line(const T* p, int64_t ahead) {
    if (reinterpret_cast<uintptr_t>(p) % 64 < sizeof(V) / sizeof(C) * sizeof(T)) {
      __builtin_prefetch(p + ahead, 0, 2);
    }
  }

  static Moments block(const T* z, int64_t n) {
    V sum, square;
    // Each term is divided before it is added: values near the largest float do not overflow.
    if (n <= kAll) {
      const V share = broadcast<V>(1.0 / static_cast<double>(n));
      accumulate<V>(n, sum, square, [=](int64_t i, auto lanes, V& s, V&) FUSED_INLINE {
        s += load(z + i, lanes) * share;
      });
    } else {
      constexpr int64_t kDistance = kStep * Base::kPack;
      const int64_t packs = (n - Base::kPack) / kDistance + 1;
      const V share = broadcast<V>(1.0 / static_cast<double>(packs * Base::kPack));
      V sums[Base::kVectors]{};
      for (int64_t i = 0; i < packs * kDistance; i += kDistance) {
#pragma GCC unroll 4
        for (int k = 0; k < Base::kVectors; ++k) {
          sums[k] += load(z + i + k * kLanes, All<V>{}) * share;
        }
      }
      sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
    const C first = sum_lanes(sum);
    const V center = broadcast<V>(first);
    accumulate<V>(n, sum, square, [=](int64_t i, auto lanes, V& s, V& q) FUSED_INLINE {
      prefetch_line(z + i, n);
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

  // Of the first `present` rows that are, takes every step-th, and calls body(rows) for arrays of
  // kTogether of them, then of single ones.
  static constexpr int kTogether = 4;
  template <class F>
  FUSED_INLINE static void each_rows(const T* z, const bool* mask, int64_t present, int64_t step,
                                     int64_t cols, const F& body) {
    const T* found[kTogether];
    int count = 0;
    int64_t next = 0;
    for (int64_t row = 0, index = 0; index < present; ++row) {
      if (mask && !mask[row]) continue;
      if (index++ != next) continue;
      next += step;
      found[count++] = z + row * cols;
      if (count == kTogether) {
        body(found, std::integral_constant<int, kTogether>{});
        count = 0;
      }
    }
    for (int k = 0; k < count; ++k) body(found + k, std::integral_constant<int, 1>{});
  }

  static void columns(const void* z_, const bool* mask, int64_t present, int64_t cols, double* mean,
                      double* square, void* scratch) {
    const T* const z = static_cast<const T*>(z_);
    C *const first = static_cast<C*>(scratch), *const sums = first + cols,
             *const squares = sums + cols;
    std::fill_n(first, 3 * cols, C(0));
    const int64_t step = std::clamp<int64_t>(present / kAllRows, 1, kStep);
    const V share = broadcast<V>(1.0 / static_cast<double>((present + step - 1) / step));
    each_rows(z, mask, present, step, cols, [=](const T* const* row, auto count) FUSED_INLINE {
      for_each_vector<V>(0, cols, [=](int64_t i, auto n) FUSED_INLINE {
        V sum = load(first + i, n);
#pragma GCC unroll 4
        for (int k = 0; k < decltype(count)::value; ++k) sum += load(row[k] + i, n) * share;
        store(first + i, sum, n);
      });
    });
    each_rows(z, mask, present, 1, cols, [=](const T* const* row, auto count) FUSED_INLINE {
      for_each_vector<V>(0, cols, [=](int64_t i, auto n) FUSED_INLINE {
        const V center = load(first + i, n);
        // In pairs: a long sum then has fewer roundings one after the other.
        constexpr int kCount = decltype(count)::value, kPair = kCount > 1 ? 2 : 1;
        V sum[kCount], square[kCount];
#pragma GCC unroll 4
        for (int k = 0; k < kCount; ++k) {
          prefetch_line(row[k] + i, present * cols);
          const V d = load(row[k] + i, n) - center;
          sum[k] = k % kPair ? sum[k - 1] + d : d;
          square[k] = k % kPair ? square[k - 1] + d * d : d * d;
        }
        const V all = kCount > 1 ? sum[kPair - 1] + sum[kCount - 1] : sum[0];
        const V of_squares = kCount > 1 ? square[kPair - 1] + square[kCount - 1] : square[0];
        store(sums + i, load(sums + i, n) + all, n);
        store(squares + i, load(squares + i, n) + of_squares, n);
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
