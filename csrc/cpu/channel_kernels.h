// The table of the channel kernels for the instruction set that this file is compiled for.
#pragma once

#include "channel_backward.h"
#include "channel_forward.h"
#include "channel_statistics.h"

namespace fused::FUSED_TARGET {

template <class C, class Activation>
struct ActivationStages : Packs<C> {
  using Base = Packs<C>;
  using typename Base::V;

  static ActivationParameters<V> parameters(double alpha, double beta) {
    return {broadcast<V>(alpha), broadcast<V>(beta)};
  }

  static void value(void* h_, int64_t size, double alpha, double beta) {
    C* const h = static_cast<C*>(h_);
    const ActivationParameters<V> given = parameters(alpha, beta);
    Base::for_each_pack(size, [=](int64_t start, auto count, auto n) FUSED_INLINE {
#pragma GCC unroll 4
      for (int k = 0; k < decltype(count)::value; ++k) {
        C* const p = h + start + k * Base::kLanes;
        store(p, Activation::value(load(p, n), given), n);
      }
    });
  }

  static void gradient(void* g_, const void* h_, int64_t size, double alpha, double beta) {
    C* const g = static_cast<C*>(g_);
    const C* const h = static_cast<const C*>(h_);
    const ActivationParameters<V> given = parameters(alpha, beta);
    Base::for_each_pack(size, [=](int64_t start, auto count, auto n) FUSED_INLINE {
#pragma GCC unroll 4
      for (int k = 0; k < decltype(count)::value; ++k) {
        const int64_t i = start + k * Base::kLanes;
        store(g + i, Activation::gradient(load(g + i, n), load(h + i, n), given), n);
      }
    });
  }
};

template <class C>
inline void fill_stages(ChannelKernels& kernels, int compute) {
  int code = 0;
#define FUSED_FILL(Activation)                                           \
  kernels.value[compute][code] = ActivationStages<C, Activation>::value; \
  kernels.gradient_stage[compute][code++] = ActivationStages<C, Activation>::gradient;
  FUSED_FOR_EACH_ACTIVATION(FUSED_FILL)
#undef FUSED_FILL
}

template <class T, By kBy>
inline void fill_channel_kernels(ChannelKernels& kernels, Storage storage_) {
  const int storage = static_cast<int>(storage_), by = static_cast<int>(kBy);
  using enum Through;
  kernels.forward[storage][by][0] = ChannelForwardKernel<T, kBy, comparison>::run;
  kernels.forward[storage][by][1] = ChannelForwardKernel<T, kBy, stage>::run;
  kernels.sums[storage][by][0] = ChannelSumsKernel<T, kBy, comparison>::run;
  kernels.sums[storage][by][1] = ChannelSumsKernel<T, kBy, stage>::run;
  kernels.gradient[storage][by][0] = ChannelGradientKernel<T, kBy, comparison>::run;
  kernels.gradient[storage][by][1] = ChannelGradientKernel<T, kBy, stage>::run;
  kernels.gradient[storage][by][2] = ChannelGradientKernel<T, kBy, gradient>::run;
}

template <class T>
inline void fill_storage(ChannelKernels& kernels, Storage storage) {
  kernels.moments[static_cast<int>(storage)] = ChannelMoments<T>::runs;
  kernels.column_moments[static_cast<int>(storage)] = ChannelMoments<T>::columns;
  fill_channel_kernels<T, By::row>(kernels, storage);
  fill_channel_kernels<T, By::column>(kernels, storage);
}

inline ChannelKernels make_channel_kernels() {
  ChannelKernels kernels{};
  fill_storage<float>(kernels, Storage::f32);
  fill_storage<bfloat16>(kernels, Storage::bf16);
  fill_storage<float16>(kernels, Storage::f16);
  fill_storage<double>(kernels, Storage::f64);
  fill_stages<float>(kernels, 0);
  fill_stages<double>(kernels, 1);
  return kernels;
}

}  // namespace fused::FUSED_TARGET
