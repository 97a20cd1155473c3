// The forward kernel of the channel norms, for statistics that are known.
#pragma once

#include "channel_base.h"

namespace fused::FUSED_TARGET {

template <class T, By kBy, Through kThrough>
struct ChannelForwardKernel : ChannelBase<T, kBy, kThrough> {
  using Base = ChannelBase<T, kBy, kThrough>;
  using typename Base::C;
  using typename Base::Coefficient;
  using typename Base::V;

  static void run(const ChannelStages& stages, const ChannelRows& rows) {
    const int64_t cols = rows.cols;
    const bool streaming = stages.streaming;
    typename Base::Call call(stages, rows);
    for (int64_t row = 0; row < rows.rows; ++row) {
      if (Base::left_out(rows, row)) continue;
      const T* const z = static_cast<const T*>(rows.z) + row * rows.stride;
      T* const y = static_cast<T*>(rows.out) + row * rows.stride;
      const T* const residual =
          rows.residual ? static_cast<const T*>(rows.residual) + row * rows.stride : nullptr;
      const Coefficients& c = rows.coefficients;
      const int64_t own = row * rows.coefficient_step;
      const Coefficient mean(c.mean, own), scale(c.scale, own), shift(c.shift, own),
          factor(c.factor, own);
      const uint64_t counter = rows.counter + static_cast<uint64_t>(row) * rows.row_counters;
      const auto finish = [&](int64_t start, auto n, auto& values) FUSED_INLINE {
        constexpr int kCount = sizeof(values) / sizeof(V);
        call.drop(values, start, n, counter, factor);
        if (residual) {
          Base::template each<kCount>(
              start, [&](int k, int64_t i) FUSED_INLINE { values[k] += load(residual + i, n); });
        }
        Base::template each<kCount>(start, [&](int k, int64_t i) FUSED_INLINE {
          Base::store_output(y + i, values[k], n, streaming);
        });
      };
      if constexpr (kThrough == Through::comparison) {
        Base::for_each_pack(cols, [&](int64_t start, auto count, auto n) FUSED_INLINE {
          constexpr int kCount = decltype(count)::value;
          Base::prefetch_pack(z + start + Base::kAhead);
          V values[kCount];
          Base::template each<kCount>(start, [&](int k, int64_t i) FUSED_INLINE {
            const V h = (load(z + i, n) - mean.at(i, n)) * scale.at(i, n) + shift.at(i, n);
            values[k] = Floor::value(h, call.parameters);
          });
          finish(start, n, values);
        });
      } else {
        alignas(64) C h[kSegment];
        for (int64_t first = 0; first < cols; first += kSegment) {
          const int64_t size = std::min(kSegment, cols - first);
          Base::for_each_pack(size, [&](int64_t from, auto count, auto n) FUSED_INLINE {
            Base::prefetch_pack(z + first + from + Base::kAhead);
            Base::template each<decltype(count)::value>(from, [&](int, int64_t j) FUSED_INLINE {
              const int64_t i = first + j;
              store(h + j, (load(z + i, n) - mean.at(i, n)) * scale.at(i, n) + shift.at(i, n), n);
            });
          });
          stages.value(h, size, stages.alpha, stages.beta);
          Base::for_each_pack(size, [&](int64_t from, auto count, auto n) FUSED_INLINE {
            constexpr int kCount = decltype(count)::value;
            V values[kCount];
            Base::template each<kCount>(
                from, [&](int k, int64_t j) FUSED_INLINE { values[k] = load(h + j, n); });
            finish(first + from, n, values);
          });
        }
      }
    }
    if (streaming) fence_streaming();
  }
};

}  // namespace fused::FUSED_TARGET
