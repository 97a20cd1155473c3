// The backward row kernel. It reads z and dy, recomputes the normalised row, the mask and the
// derivative, and writes dz, with the column sums of the parameters' gradients on the way.
#pragma once

#include "row_statistics.h"
// After pack.h, as norm.h.
#include "../activation.h"

namespace fused::FUSED_TARGET {

// The second pass over a row, which does not depend on the activation.
template <class T>
struct RowBackwardBase : RowBase<T> {
  using Base = RowBase<T>;
  using Base::kLanes, Base::add_to, Base::array, Base::load_input, Base::store_output;
  using typename Base::C;
  using typename Base::V;

  // dz of one row from the gradient of its normalised values, and the linear bias's column sum.
  [[gnu::noinline]] static void finish(const RowBackward& problem, int64_t row,
                                       const C* const gradient, V mean_g, V mean_gx,
                                       const RowStatistics<V>& given, C* const dbias) {
    const T* const z = static_cast<const T*>(problem.z) + row * problem.z_stride;
    T* const dz = static_cast<T*>(problem.dz) + row * problem.cols;
    const C* const bias = array(problem.bias);
    const RowStatistics<V> statistics = given;
    const bool streaming = problem.streaming;
    Base::for_each_pack(problem.cols, [=](int64_t start, auto count, auto n) FUSED_INLINE {
#pragma GCC unroll 4
      for (int k = 0; k < decltype(count)::value; ++k) {
        const int64_t i = start + k * kLanes;
        const V x = normalize(load_input(z, bias, i, n), statistics);
        const V d = normalize_gradient(load(gradient + i, n), x, mean_g, mean_gx, statistics);
        if (dbias) add_to(dbias, i, d, n);
        store_output(dz + i, d, n, streaming);
      }
    });
  }
};

template <class T, class Activation>
struct RowBackwardKernel : RowBackwardBase<T> {
  using Base = RowBackwardBase<T>;
  using Base::kLanes, Base::add_to, Base::array, Base::load_input, Base::store_output;
  using typename Base::C;
  using typename Base::V;

  static void run(const RowBackward& problem, int64_t begin, int64_t end, const ColumnSums& sums,
                  void* scratch) {
    const int64_t cols = problem.cols, z_stride = problem.z_stride, dy_stride = problem.dy_stride;
    const bool normed = problem.norm != Norm::none, centered = problem.norm == Norm::layer;
    const bool streaming = problem.streaming;
    const C *const bias = array(problem.bias), *const weight = array(problem.norm_weight),
                   *const shift = array(problem.norm_bias);
    C *const gradient = static_cast<C*>(scratch),
             *const dweight = static_cast<C*>(sums.norm_weight),
             *const dshift = static_cast<C*>(sums.norm_bias),
             *const dbias = static_cast<C*>(sums.bias);
    const ActivationParameters<V> parameters{broadcast<V>(problem.alpha),
                                             broadcast<V>(problem.beta)};
    const uint32_t threshold = problem.threshold;
    const V scale = Base::dropout_scale(threshold);
    const C inverse = C(1) / static_cast<C>(cols);
    const uint64_t groups =
        static_cast<uint64_t>(cols + kElementsPerCounter - 1) / kElementsPerCounter;
    const PhiloxKeys keys(problem.seed);
    KeepBlock keep;

    for (int64_t row = begin; row < end; ++row) {
      const T* const z = static_cast<const T*>(problem.z) + row * z_stride;
      const T* const dy = static_cast<const T*>(problem.dy) + row * dy_stride;
      const T* const next_z = row + 1 < end ? z + z_stride : z;
      const T* const next_dy = row + 1 < end ? dy + dy_stride : dy;
      T* const dz = static_cast<T*>(problem.dz) + row * cols;
      const RowStatistics<V> statistics{broadcast<V>(centered ? array(problem.mean)[row] : C(0)),
                                        broadcast<V>(normed ? array(problem.rstd)[row] : C(1))};
      const uint64_t counter = static_cast<uint64_t>(row) * groups;
      V sum_g{}, sum_gx{};

      Base::for_each_pack(cols, [&](int64_t start, auto count, auto n) FUSED_INLINE {
        constexpr int kCount = decltype(count)::value;
        const auto each = [start](const auto& body) FUSED_INLINE {
#pragma GCC unroll 4
          for (int k = 0; k < kCount; ++k) body(k, start + k * kLanes);
        };
        V x[kCount], h[kCount], g[kCount];
        Base::prefetch_pack(next_z + start);
        Base::prefetch_pack(next_dy + start);
        each([&](int k, int64_t i) FUSED_INLINE { x[k] = load_input(z, bias, i, n); });
        if (normed) {
          each([&](int k, int64_t) FUSED_INLINE { x[k] = normalize(x[k], statistics); });
        }
        if (weight && shift) {
          each([&](int k, int64_t i)
                   FUSED_INLINE { h[k] = x[k] * load(weight + i, n) + load(shift + i, n); });
        } else {
          each([&](int k, int64_t i) FUSED_INLINE {
            h[k] = x[k];
            if (weight) h[k] *= load(weight + i, n);
            if (shift) h[k] += load(shift + i, n);
          });
        }
        each([&](int k, int64_t i)
                 FUSED_INLINE { g[k] = Activation::gradient(load(dy + i, n), h[k], parameters); });
        if (threshold) {
          const int offset = static_cast<int>(start % kRandomBlock);
          if (offset == 0) keep.draw(keys, counter + start / kElementsPerCounter, threshold);
          each([&](int k, int64_t)
                   FUSED_INLINE { g[k] *= keep.factor(offset + k * kLanes, scale); });
        }
        if (!normed) {
          each([&](int k, int64_t i) FUSED_INLINE {
            if (dbias) add_to(dbias, i, g[k], n);
            store_output(dz + i, g[k], n, streaming);
          });
          return;
        }
        if (dweight) {
          each([&](int k, int64_t i) FUSED_INLINE { add_to(dweight, i, g[k] * x[k], n); });
        }
        if (dshift) each([&](int k, int64_t i) FUSED_INLINE { add_to(dshift, i, g[k], n); });
        if (weight) each([&](int k, int64_t i) FUSED_INLINE { g[k] *= load(weight + i, n); });
        each([&](int k, int64_t i) FUSED_INLINE {
          g[k] = first_lanes(g[k], n);
          sum_g += g[k];
          sum_gx += g[k] * x[k];
          store(gradient + i, g[k], n);
        });
      });
      if (!normed) continue;
      const V mean_g = broadcast<V>(centered ? sum_lanes(sum_g) * inverse : C(0));
      const V mean_gx = broadcast<V>(sum_lanes(sum_gx) * inverse);
      Base::finish(problem, row, gradient, mean_g, mean_gx, statistics, dbias);
    }
    if (streaming) fence_streaming();
  }
};

}  // namespace fused::FUSED_TARGET
