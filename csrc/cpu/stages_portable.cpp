// The activations as stages for the baseline instruction set.
#include "activation_stages.h"

namespace fused {

const StageTable& stages_portable() {
  static const StageTable kernels = portable::make_stages();
  return kernels;
}

}  // namespace fused
