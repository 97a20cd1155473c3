// The kernels of gated activations for AVX-512 (F, BW, DQ, VL).
#include "gated_kernels.h"

namespace fused {

const GatedKernels& gated_kernels_avx512() {
  static const GatedKernels kernels = avx512::make_gated_kernels();
  return kernels;
}

}  // namespace fused
