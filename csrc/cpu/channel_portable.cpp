// The channel kernels for the baseline instruction set.
#include "channel_kernels.h"

namespace fused {

const ChannelKernels& channel_kernels_portable() {
  static const ChannelKernels kernels = portable::make_channel_kernels();
  return kernels;
}

}  // namespace fused
