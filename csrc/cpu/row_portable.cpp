// The row kernels for the baseline instruction set.
#include "row_kernels.h"

namespace fused {

const RowKernels& row_kernels_portable() {
  static const RowKernels kernels = [] {
    RowKernels made = portable::make_row_kernels();
    add_gated_portable(made);
    return made;
  }();
  return kernels;
}

}  // namespace fused
