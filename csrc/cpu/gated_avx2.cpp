// The kernels of gated activations for AVX2, FMA and F16C.
#include "gated_kernels.h"

namespace fused {

const GatedKernels& gated_kernels_avx2() {
  static const GatedKernels kernels = avx2::make_gated_kernels();
  return kernels;
}

}  // namespace fused
