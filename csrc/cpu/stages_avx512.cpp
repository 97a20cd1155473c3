// The activations as stages for AVX-512 (F, BW, DQ, VL).
#include "activation_stages.h"

namespace fused {

const StageTable& stages_avx512() {
  static const StageTable kernels = avx512::make_stages();
  return kernels;
}

}  // namespace fused
