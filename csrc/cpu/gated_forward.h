// The forward kernel of gated activations, y = residual + dropout(a·gate(b)), (a, b) the halves of
// norm(z + bias). It is the row kernel but for that: z is read once from memory, statistics are
// those of all 2N columns, and one pass over the N columns of y does the rest.
#pragma once

#include "gated_base.h"

namespace fused::FUSED_TARGET {

template <class T, class Gate>
struct GatedForwardKernel : RowBase<T> {
  using Base = RowBase<T>;
  using Base::kLanes, Base::array, Base::load_input, Base::store_output;
  using typename Base::C;
  using typename Base::V;

  static void run(const RowForward& problem, int64_t begin, int64_t end, void* scratch_) {
    // Copies, as in RowForwardKernel.
    C* const scratch = static_cast<C*>(scratch_);
    const int64_t cols = problem.cols, half = cols / 2, z_stride = problem.z_stride;
    const bool normed = problem.norm != Norm::none, streaming = problem.streaming;
    const bool centered = problem.norm == Norm::layer;
    const bool copied = normed && Base::must_copy(problem);
    const C *const bias = array(problem.bias), *const weight = array(problem.norm_weight),
                   *const shift = array(problem.norm_bias);
    const ActivationParameters<V> parameters{};  // no gate has any
    const uint32_t threshold = problem.threshold;
    const V scale = Base::dropout_scale(threshold);
    const int64_t batch = Base::batch_rows(cols);
    const uint64_t groups =
        static_cast<uint64_t>(half + kElementsPerCounter - 1) / kElementsPerCounter;
    const PhiloxKeys keys(problem.seed);
    KeepBlock keep;

    for (int64_t first = begin; first < end; first += batch) {
      const int64_t last = std::min(end, first + batch);
      if (normed) Base::statistics(problem, first, last, scratch);
      for (int64_t row = first; row < last; ++row) {
        const T* const z = static_cast<const T*>(problem.z) + row * z_stride;
        const T* const next = row + batch < end ? z + batch * z_stride : z;
        const C* const copy = scratch + (row - first) * cols;
        const T* const residual = problem.residual ? static_cast<const T*>(problem.residual) +
                                                         row * problem.residual_stride
                                                   : nullptr;
        T* const y = static_cast<T*>(problem.y) + row * problem.y_stride;
        const RowStatistics<V> statistics{broadcast<V>(centered ? array(problem.mean)[row] : C(0)),
                                          broadcast<V>(normed ? array(problem.rstd)[row] : C(1))};
        const uint64_t counter = static_cast<uint64_t>(row) * groups;

        Base::for_each_pack(half, [&](int64_t start, auto count, auto n) FUSED_INLINE {
          constexpr int kCount = decltype(count)::value;
          const auto load_half = [&](V(&h)[kCount], int64_t from) FUSED_INLINE {
            Base::prefetch_pack(next + from);
            if (copied) {
              each_vector(h, from,
                          [&](int k, int64_t i) FUSED_INLINE { h[k] = load(copy + i, n); });
            } else {
              each_vector(h, from,
                          [&](int k, int64_t i) FUSED_INLINE { h[k] = load_input(z, bias, i, n); });
            }
            if (normed) {
              each_vector(h, from,
                          [&](int k, int64_t) FUSED_INLINE { h[k] = normalize(h[k], statistics); });
            }
            scale_and_shift(h, weight, shift, from, n);
          };
          V out[kCount], a[kCount];
          load_half(out, half + start);
          each_vector(out, start, [&](int k, int64_t) FUSED_INLINE {
            out[k] = Gate::value(out[k], parameters);
          });
          load_half(a, start);
          each_vector(a, start, [&](int k, int64_t) FUSED_INLINE { out[k] *= a[k]; });
          if (threshold) {
            const int offset = static_cast<int>(start % kRandomBlock);
            if (offset == 0) keep.draw(keys, counter + start / kElementsPerCounter, threshold);
            each_vector(a, start, [&](int k, int64_t) FUSED_INLINE {
              out[k] *= keep.factor(offset + k * kLanes, scale);
            });
          }
          if (residual) {
            each_vector(a, start,
                        [&](int k, int64_t i) FUSED_INLINE { out[k] += load(residual + i, n); });
          }
          each_vector(a, start, [&](int k, int64_t i) FUSED_INLINE {
            store_output(y + i, out[k], n, streaming);
          });
        });
      }
    }
    if (streaming) fence_streaming();
  }
};

}  // namespace fused::FUSED_TARGET
