// The channel kernels for AVX-512 (F, BW, DQ, VL).
#include "channel_kernels.h"

namespace fused {

const ChannelKernels& channel_kernels_avx512() {
  static const ChannelKernels kernels = avx512::make_channel_kernels();
  return kernels;
}

}  // namespace fused
