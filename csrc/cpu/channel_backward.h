// The backward kernels of the channel norms: the sums of g, from which csrc/channel_backward.cpp
// makes slope and offset, and dz.
#pragma once

#include "channel_base.h"

namespace fused::FUSED_TARGET {

template <class T, By kBy, Through kThrough>
struct ChannelSumsKernel : ChannelBase<T, kBy, kThrough> {
  using Base = ChannelBase<T, kBy, kThrough>;
  using typename Base::C;
  using typename Base::Coefficient;
  using typename Base::V;
  // Differences that are no normal numbers would lose digits in products with g.
  static constexpr double kUp = 0x1p24;
  // What is added up in the compute type before the sum goes on in double, as torch's sums do from
  // the first element on: columns of a row, spread over the lanes of several vectors, and rows.
  // With 4096 and 256 the gradient of the norm's weight had up to seven times eager's error.
  static constexpr int64_t kBlock = 1024, kRows = 8;

  // Adds the sums of columns to those in double, and sets them to zero.
  [[gnu::noinline]] static void go_on_in_double(double* const sums, C* const column_g,
                                                const int64_t cols) {
    for_each_vector<V>(0, cols, [=](int64_t i, auto n) FUSED_INLINE {
      add_doubles(sums + i, load(column_g + i, n), 1, n);
      add_doubles(sums + cols + i, load(column_g + cols + i, n), 1 / kUp, n);
      store(column_g + i, V{}, n);
      store(column_g + cols + i, V{}, n);
    });
  }

  static void run(const ChannelStages& stages, const ChannelRows& rows) {
    const int64_t cols = rows.cols;
    C* const column_g = kBy == By::column && rows.sums ? static_cast<C*>(rows.scratch) : nullptr;
    C* const column_gd = column_g ? column_g + cols : nullptr;
    if (column_g) {
      std::fill_n(column_g, 2 * cols, C(0));
      std::fill_n(rows.sums, 2 * cols, 0.0);
    }
    int64_t added = 0;
    const V up = broadcast<V>(kUp);
    typename Base::Call call(stages, rows);
    for (int64_t row = 0; row < rows.rows; ++row) {
      if (Base::left_out(rows, row)) continue;
      T* const dz = rows.out ? static_cast<T*>(rows.out) + row * rows.stride : nullptr;
      C* const kept = rows.gradient ? static_cast<C*>(rows.gradient) + row * cols : nullptr;
      const Coefficient scale(rows.coefficients.scale, row * rows.coefficient_step);
      const bool streaming = stages.streaming;
      double total[2] = {0, 0};
      for (int64_t begin = 0; begin < cols; begin += kBlock) {
        V sum_g[Base::kVectors]{}, sum_gd[Base::kVectors]{};
        Base::each_gradient(
            stages, call, rows, row, begin, std::min(cols, begin + kBlock),
            [&](int64_t start, auto n, auto& g, auto& d) FUSED_INLINE {
              constexpr int kCount = sizeof(g) / sizeof(V);
              Base::template each<kCount>(start, [&](int k, int64_t i) FUSED_INLINE {
                if (kept) store(kept + i, g[k], n);
                if (dz) Base::store_output(dz + i, g[k] * scale.at(i, n), n, streaming);
              });
              if constexpr (kBy == By::row) {
                Base::template each<kCount>(start, [&](int k, int64_t) FUSED_INLINE {
                  g[k] = first_lanes(g[k], n);
                  sum_g[k] += g[k];
                  sum_gd[k] += g[k] * (d[k] * up);
                });
              } else if (column_g) {
                Base::template each<kCount>(start, [&](int k, int64_t i) FUSED_INLINE {
                  Base::add_to(column_g, i, g[k], n);
                  Base::add_to(column_gd, i, g[k] * (d[k] * up), n);
                });
              }
            });
        if constexpr (kBy == By::row) {
          total[0] += sum_lanes((sum_g[0] + sum_g[1]) + (sum_g[2] + sum_g[3]));
          total[1] += sum_lanes((sum_gd[0] + sum_gd[1]) + (sum_gd[2] + sum_gd[3]));
        }
      }
      if constexpr (kBy == By::row) {
        if (rows.sums) {
          rows.sums[2 * row] = total[0];
          rows.sums[2 * row + 1] = total[1] * (1 / kUp);
        }
      } else if (column_g && ++added == kRows) {
        go_on_in_double(rows.sums, column_g, cols);
        added = 0;
      }
    }
    if (added) go_on_in_double(rows.sums, column_g, cols);
    if (rows.out && stages.streaming) fence_streaming();
  }
};

template <class T, By kBy, Through kThrough>
struct ChannelGradientKernel : ChannelBase<T, kBy, kThrough> {
  using Base = ChannelBase<T, kBy, kThrough>;
  using typename Base::C;
  using typename Base::Coefficient;
  using typename Base::V;

  static void run(const ChannelStages& stages, const ChannelRows& rows) {
    const int64_t cols = rows.cols;
    typename Base::Call call(stages, rows);
    for (int64_t row = 0; row < rows.rows; ++row) {
      if (Base::left_out(rows, row)) continue;
      T* const dz = static_cast<T*>(rows.out) + row * rows.stride;
      const Coefficients& c = rows.coefficients;
      const int64_t own = row * rows.coefficient_step;
      const Coefficient scale(c.scale, own), slope(c.slope, own), offset(c.offset, own);
      const bool streaming = stages.streaming;
      const auto finish = [&](int64_t start, auto n, auto& g, auto& d) FUSED_INLINE {
        Base::template each<sizeof(g) / sizeof(V)>(start, [&](int k, int64_t i) FUSED_INLINE {
          const V result = g[k] * scale.at(i, n) + (d[k] * slope.at(i, n) + offset.at(i, n));
          Base::store_output(dz + i, result, n, streaming);
        });
      };
      if constexpr (kThrough == Through::gradient) {
        const T* const z = static_cast<const T*>(rows.z) + row * rows.stride;
        const C* const gradient = static_cast<const C*>(rows.gradient) + row * cols;
        const Coefficient mean(c.mean, own);
        Base::for_each_pack(cols, [&](int64_t start, auto count, auto n) FUSED_INLINE {
          constexpr int kCount = decltype(count)::value;
          V g[kCount], d[kCount];
          Base::template each<kCount>(start, [&](int k, int64_t i) FUSED_INLINE {
            g[k] = load(gradient + i, n);
            d[k] = load(z + i, n) - mean.at(i, n);
          });
          finish(start, n, g, d);
        });
      } else {
        Base::each_gradient(stages, call, rows, row, 0, cols, finish);
      }
    }
    if (stages.streaming) fence_streaming();
  }
};

}  // namespace fused::FUSED_TARGET
