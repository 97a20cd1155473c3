// The row kernels for the baseline instruction set.
#include "row_kernels.h"

namespace fused {

const RowKernels& row_kernels_portable() {
  static const RowKernels kernels = portable::make_row_kernels();
  return kernels;
}

}  // namespace fused
