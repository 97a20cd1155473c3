// The kernels of gated activations for AVX2, FMA and F16C.
#include "gated_kernels.h"

namespace fused {

void add_gated_avx2(RowKernels& kernels) { avx2::add_gated_kernels(kernels); }

}  // namespace fused
