// The forward row kernel: norm, activation, dropout and residual in one pass over rows that stay in
// cache. z is read once from memory; statistics take two passes over the cached rows, then one more
// normalises, activates, drops and stores.
#pragma once

#include "row_statistics.h"
// After pack.h, as norm.h.
#include "../activation.h"

namespace fused::FUSED_TARGET {

template <class T, class Activation>
struct RowForwardKernel : RowBase<T> {
  using Base = RowBase<T>;
  using Base::kLanes, Base::array, Base::load_input, Base::store_output;
  using typename Base::C;
  using typename Base::V;

  static void run(const RowForward& problem, int64_t begin, int64_t end, void* scratch_) {
    // Copies: a store through a pointer could change what is behind a reference, so the compiler
    // would load it again for every vector.
    C* const scratch = static_cast<C*>(scratch_);
    const int64_t cols = problem.cols, z_stride = problem.z_stride;
    const bool normed = problem.norm != Norm::none, streaming = problem.streaming;
    const bool centered = problem.norm == Norm::layer;
    const bool copied = normed && Base::must_copy(problem);
    const C *const bias = array(problem.bias), *const weight = array(problem.norm_weight),
                   *const shift = array(problem.norm_bias);
    const ActivationParameters<V> parameters{broadcast<V>(problem.alpha),
                                             broadcast<V>(problem.beta)};
    const uint32_t threshold = problem.threshold;
    const V scale = Base::dropout_scale(threshold);
    const int64_t batch = Base::batch_rows(cols);
    const uint64_t groups =
        static_cast<uint64_t>(cols + kElementsPerCounter - 1) / kElementsPerCounter;
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

        Base::for_each_pack(cols, [&](int64_t start, auto count, auto n) FUSED_INLINE {
          constexpr int kCount = decltype(count)::value;
          const auto each = [start](const auto& body) FUSED_INLINE {
#pragma GCC unroll 4
            for (int k = 0; k < kCount; ++k) body(k, start + k * kLanes);
          };
          V h[kCount];
          Base::prefetch_pack(next + start);
          if (copied) {
            each([&](int k, int64_t i) FUSED_INLINE { h[k] = load(copy + i, n); });
          } else {
            each([&](int k, int64_t i) FUSED_INLINE { h[k] = load_input(z, bias, i, n); });
          }
          if (normed) {
            each([&](int k, int64_t) FUSED_INLINE { h[k] = normalize(h[k], statistics); });
          }
          if (weight && shift) {
            each([&](int k, int64_t i)
                     FUSED_INLINE { h[k] = h[k] * load(weight + i, n) + load(shift + i, n); });
          } else if (weight) {
            each([&](int k, int64_t i) FUSED_INLINE { h[k] *= load(weight + i, n); });
          } else if (shift) {
            each([&](int k, int64_t i) FUSED_INLINE { h[k] += load(shift + i, n); });
          }
          each([&](int k, int64_t) FUSED_INLINE { h[k] = Activation::value(h[k], parameters); });
          if (threshold) {
            const int offset = static_cast<int>(start % kRandomBlock);
            if (offset == 0) keep.draw(keys, counter + start / kElementsPerCounter, threshold);
            each([&](int k, int64_t)
                     FUSED_INLINE { h[k] *= keep.factor(offset + k * kLanes, scale); });
          }
          if (residual) {
            each([&](int k, int64_t i) FUSED_INLINE { h[k] += load(residual + i, n); });
          }
          each([&](int k, int64_t i) FUSED_INLINE { store_output(y + i, h[k], n, streaming); });
        });
      }
    }
    if (streaming) fence_streaming();
  }
};

}  // namespace fused::FUSED_TARGET
