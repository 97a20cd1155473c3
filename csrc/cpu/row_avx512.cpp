// The row kernels for AVX-512 (F, BW, DQ, VL).
#include "row_kernels.h"

namespace fused {

const RowKernels& row_kernels_avx512() {
  static const RowKernels kernels = avx512::make_row_kernels();
  return kernels;
}

}  // namespace fused
