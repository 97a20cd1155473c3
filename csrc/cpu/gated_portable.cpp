// The kernels of gated activations for the baseline instruction set.
#include "gated_kernels.h"

namespace fused {

const GatedKernels& gated_kernels_portable() {
  static const GatedKernels kernels = portable::make_gated_kernels();
  return kernels;
}

}  // namespace fused
