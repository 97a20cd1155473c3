// The channel kernels for AVX2, FMA and F16C.
#include "channel_kernels.h"

namespace fused {

const ChannelKernels& channel_kernels_avx2() {
  static const ChannelKernels kernels = avx2::make_channel_kernels();
  return kernels;
}

}  // namespace fused
