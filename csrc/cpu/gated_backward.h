// The backward kernel of gated activations. With g the gradient before dropout, the halves of h get
// g·gate(b) and gate'(b)·(g·a); from there on, 2N columns go the way of the row kernel's.
#pragma once

#include "gated_base.h"
#include "row_backward.h"

namespace fused::FUSED_TARGET {

template <class T, class Gate>
struct GatedBackwardKernel : RowBackwardBase<T> {
  using Base = RowBackwardBase<T>;
  using Base::kLanes, Base::add_to, Base::array, Base::load_input, Base::store_output;
  using typename Base::C;
  using typename Base::V;

  static void run(const RowBackward& problem, int64_t begin, int64_t end, const ColumnSums& sums,
                  void* scratch) {
    const int64_t cols = problem.cols, half = cols / 2;
    const int64_t z_stride = problem.z_stride, dy_stride = problem.dy_stride;
    const bool normed = problem.norm != Norm::none, centered = problem.norm == Norm::layer;
    const bool streaming = problem.streaming;
    const C *const bias = array(problem.bias), *const weight = array(problem.norm_weight),
                   *const shift = array(problem.norm_bias);
    C *const gradient = static_cast<C*>(scratch),
             *const dweight = static_cast<C*>(sums.norm_weight),
             *const dshift = static_cast<C*>(sums.norm_bias),
             *const dbias = static_cast<C*>(sums.bias);
    const ActivationParameters<V> parameters{};  // no gate has any
    const uint32_t threshold = problem.threshold;
    const V scale = Base::dropout_scale(threshold);
    const C inverse = C(1) / static_cast<C>(cols);
    const uint64_t groups =
        static_cast<uint64_t>(half + kElementsPerCounter - 1) / kElementsPerCounter;
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

      Base::for_each_pack(half, [&](int64_t start, auto count, auto n) FUSED_INLINE {
        constexpr int kCount = decltype(count)::value;
        const auto load_half = [&](V(&x)[kCount], V(&h)[kCount], int64_t from) FUSED_INLINE {
          Base::prefetch_pack(next_z + from);
          each_vector(x, from,
                      [&](int k, int64_t i) FUSED_INLINE { x[k] = load_input(z, bias, i, n); });
          if (normed) {
            each_vector(x, from,
                        [&](int k, int64_t) FUSED_INLINE { x[k] = normalize(x[k], statistics); });
          }
          each_vector(x, from, [&](int k, int64_t) FUSED_INLINE { h[k] = x[k]; });
          scale_and_shift(h, weight, shift, from, n);
        };
        // From the gradient of h on, d, to what is stored of it.
        const auto store_half = [&](V(&d)[kCount], const V(&x)[kCount], int64_t from) FUSED_INLINE {
          if (!normed) {
            each_vector(d, from, [&](int k, int64_t i) FUSED_INLINE {
              if (dbias) add_to(dbias, i, d[k], n);
              store_output(dz + i, d[k], n, streaming);
            });
            return;
          }
          if (dweight) {
            each_vector(d, from,
                        [&](int k, int64_t i) FUSED_INLINE { add_to(dweight, i, d[k] * x[k], n); });
          }
          if (dshift) {
            each_vector(d, from,
                        [&](int k, int64_t i) FUSED_INLINE { add_to(dshift, i, d[k], n); });
          }
          if (weight) {
            each_vector(d, from,
                        [&](int k, int64_t i) FUSED_INLINE { d[k] *= load(weight + i, n); });
          }
          each_vector(d, from, [&](int k, int64_t i) FUSED_INLINE {
            d[k] = first_lanes(d[k], n);
            sum_g += d[k];
            sum_gx += d[k] * x[k];
            store(gradient + i, d[k], n);
          });
        };

        V g[kCount], a[kCount], b[kCount], xa[kCount], xb[kCount], da[kCount], db[kCount];
        Base::prefetch_pack(next_dy + start);
        each_vector(g, start, [&](int k, int64_t i) FUSED_INLINE { g[k] = load(dy + i, n); });
        if (threshold) {
          const int offset = static_cast<int>(start % kRandomBlock);
          if (offset == 0) keep.draw(keys, counter + start / kElementsPerCounter, threshold);
          each_vector(g, start, [&](int k, int64_t) FUSED_INLINE {
            g[k] *= keep.factor(offset + k * kLanes, scale);
          });
        }
        load_half(xa, a, start);
        load_half(xb, b, half + start);
        each_vector(g, start, [&](int k, int64_t) FUSED_INLINE {
          da[k] = g[k] * Gate::value(b[k], parameters);
          db[k] = Gate::gradient(g[k] * a[k], b[k], parameters);
        });
        store_half(da, xa, start);
        store_half(db, xb, half + start);
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
