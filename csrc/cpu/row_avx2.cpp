// The row kernels for AVX2, FMA and F16C.
#include "row_kernels.h"

namespace fused {

const RowKernels& row_kernels_avx2() {
  static const RowKernels kernels = avx2::make_row_kernels();
  return kernels;
}

}  // namespace fused
