// The activations as stages for AVX2, FMA and F16C.
#include "activation_stages.h"

namespace fused {

const StageTable& stages_avx2() {
  static const StageTable kernels = avx2::make_stages();
  return kernels;
}

}  // namespace fused
