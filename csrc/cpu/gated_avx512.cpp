// The kernels of gated activations for AVX-512 (F, BW, DQ, VL).
#include "gated_kernels.h"

namespace fused {

void add_gated_avx512(RowKernels& kernels) { avx512::add_gated_kernels(kernels); }

}  // namespace fused
