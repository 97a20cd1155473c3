// The kernels of gated activations for the baseline instruction set.
#include "gated_kernels.h"

namespace fused {

void add_gated_portable(RowKernels& kernels) { portable::add_gated_kernels(kernels); }

}  // namespace fused
