// The table of the channel kernels for the instruction set that this file is compiled for.
#pragma once

#include "channel_backward.h"
#include "channel_forward.h"
#include "channel_statistics.h"

namespace fused::FUSED_TARGET {

template <class T, By kBy, Through kThrough>
inline void fill_through(ChannelKernels& kernels, Storage storage_, Through slot) {
  const int storage = static_cast<int>(storage_), by = static_cast<int>(kBy);
  const int through = static_cast<int>(slot);
  kernels.forward[storage][by][through] = channel_forward<T, kBy, kThrough>;
  kernels.sums[storage][by][through] = ChannelSumsKernel<T, kBy, kThrough>::run;
  kernels.gradient[storage][by][through] = channel_gradient<T, kBy, kThrough, false>;
}

template <class T, By kBy>
inline void fill_by(ChannelKernels& kernels, Storage storage) {
  using enum Through;
  fill_through<T, kBy, kCheapest<T>>(kernels, storage, comparison);
  fill_through<T, kBy, stage>(kernels, storage, stage);
  kernels.kept_gradient[static_cast<int>(storage)][static_cast<int>(kBy)] =
      channel_gradient<T, kBy, stage, true>;
}

template <class T>
inline void fill_storage(ChannelKernels& kernels, Storage storage) {
  kernels.moments[static_cast<int>(storage)] = ChannelMoments<T>::runs;
  kernels.column_moments[static_cast<int>(storage)] = ChannelMoments<T>::columns;
  fill_by<T, By::row>(kernels, storage);
  fill_by<T, By::column>(kernels, storage);
}

inline ChannelKernels make_channel_kernels() {
#if FUSED_AVX512
  ChannelKernels kernels =
      channel_kernels_avx2();  // for double, of which a vector is one in every instruction set
#else
  ChannelKernels kernels{};
  fill_storage<double>(kernels, Storage::f64);
#endif
  fill_storage<float>(kernels, Storage::f32);
  fill_storage<bfloat16>(kernels, Storage::bf16);
  fill_storage<float16>(kernels, Storage::f16);
  return kernels;
}

}  // namespace fused::FUSED_TARGET
