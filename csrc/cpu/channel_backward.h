// The backward kernels of the channel norms: the sums of g, from which csrc/channel_backward.cpp
// makes slope and offset, and dz.
#pragma once

#include "channel_input.h"

namespace fused::FUSED_TARGET {

template <class T, By kBy, Through kThrough>
struct ChannelSumsKernel : Packs<T> {
  using Base = Packs<T>;
  using Base::each;
  using typename Base::C;
  using typename Base::V;
  using Input = ChannelInput<T, kBy>;
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

  static void run(const Stages& stages, const ChannelRows& rows) {
    const int64_t cols = rows.cols;
    C* const column_g = kBy == By::column && rows.sums ? static_cast<C*>(rows.scratch) : nullptr;
    C* const column_gd = column_g ? column_g + cols : nullptr;
    if (column_g) {
      std::fill_n(column_g, 2 * cols, C(0));
      std::fill_n(rows.sums, 2 * cols, 0.0);
    }
    int64_t added = 0;
    const V up = broadcast<V>(kUp);
    const bool streaming = stages.streaming;
    Epilogue<T, kThrough> epilogue(stages);
    for (int64_t row = 0; row < rows.rows; ++row) {
      if (Input::left_out(rows, row)) continue;
      T* const dz = rows.out ? static_cast<T*>(rows.out) + row * rows.stride : nullptr;
      T* const dshortcut =
          rows.dshortcut ? static_cast<T*>(rows.dshortcut) + row * rows.stride : nullptr;
      C* const kept = rows.gradient ? static_cast<C*>(rows.gradient) + row * cols : nullptr;
      const Input input(rows, row);
      double total[2] = {0, 0};
      for (int64_t begin = 0; begin < cols; begin += kBlock) {
        V sum_g[Base::kVectors]{}, sum_gd[Base::kVectors]{};
        const auto done = [&](auto& g, auto& d, int64_t start, auto n) FUSED_INLINE {
          if (kept || dz || dshortcut) {
            each(g, start, [&](int k, int64_t i) FUSED_INLINE {
              if (kept) store(kept + i, g[k], n);
              if (dshortcut) store(dshortcut + i, g[k], n);
              if (dz) Base::store_output(dz + i, g[k] * input.scale.at(i, n), n, streaming);
            });
          }
          if constexpr (kBy == By::row) {
            each(g, start, [&](int k, int64_t) FUSED_INLINE {
              g[k] = first_lanes(g[k], n);
              sum_g[k] += g[k];
              sum_gd[k] += g[k] * (d[k] * up);
            });
          } else if (column_g) {
            each(g, start, [&](int k, int64_t i) FUSED_INLINE {
              Base::add_to(column_g, i, g[k], n);
              Base::add_to(column_gd, i, g[k] * (d[k] * up), n);
            });
          }
        };
        epilogue.gradient(begin, std::min(cols, begin + kBlock), input,
                          gradient_row<T, kBy>(rows, row), done);
        if constexpr (kBy == By::row) {
          total[0] += Base::sum_pack(sum_g);
          total[1] += Base::sum_pack(sum_gd);
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
    if (rows.out && streaming) fence_streaming();
  }
};

// dz; kKept: g is read from ChannelRows::gradient, not made again.
template <class T, By kBy, Through kThrough, bool kKept>
inline void channel_gradient(const Stages& stages, const ChannelRows& rows) {
  using Base = Packs<T>;
  using C = typename Base::C;
  using V = typename Base::V;
  using Input = ChannelInput<T, kBy>;
  const int64_t cols = rows.cols;
  const bool streaming = stages.streaming;
  Epilogue<T, kThrough> epilogue(stages);
  for (int64_t row = 0; row < rows.rows; ++row) {
    if (Input::left_out(rows, row)) continue;
    T* const dz = static_cast<T*>(rows.out) + row * rows.stride;
    const int64_t own = row * rows.coefficient_step;
    const Input input(rows, row);
    const Coefficient<T, kBy> slope(rows.coefficients.slope, own);
    const Coefficient<T, kBy> offset(rows.coefficients.offset, own);
    const auto finish = [&](auto& g, auto& d, int64_t start, auto n) FUSED_INLINE {
      Base::each(g, start, [&](int k, int64_t i) FUSED_INLINE {
        const V result = g[k] * input.scale.at(i, n) + (d[k] * slope.at(i, n) + offset.at(i, n));
        Base::store_output(dz + i, result, n, streaming);
      });
    };
    if constexpr (kKept) {
      const C* const gradient = static_cast<const C*>(rows.gradient) + row * cols;
      Base::for_each_pack(cols, [&](int64_t start, auto count, auto n) FUSED_INLINE {
        V g[decltype(count)::value], d[decltype(count)::value];
        Base::each(g, start, [&](int k, int64_t i) FUSED_INLINE { g[k] = load(gradient + i, n); });
        input.load(d, start, n);
        finish(g, d, start, n);
      });
    } else {
      epilogue.gradient(0, cols, input, gradient_row<T, kBy>(rows, row), finish);
    }
  }
  if (streaming) fence_streaming();
}

}  // namespace fused::FUSED_TARGET
