// The table of the row kernels for the instruction set that this file is compiled for.
#pragma once

#include "row_backward.h"
#include "row_forward.h"

namespace fused::FUSED_TARGET {

template <class T>
inline void fill_storage(RowKernels& kernels, Storage storage) {
  int code = 0;
#define FUSED_FILL(Activation)                                                             \
  kernels.forward[static_cast<int>(storage)][code] = RowForwardKernel<T, Activation>::run; \
  kernels.backward[static_cast<int>(storage)][code++] = RowBackwardKernel<T, Activation>::run;
  FUSED_FOR_EACH_ACTIVATION(FUSED_FILL)
#undef FUSED_FILL
}

inline RowKernels make_row_kernels() {
  RowKernels kernels{};
  fill_storage<float>(kernels, Storage::f32);
  fill_storage<bfloat16>(kernels, Storage::bf16);
  fill_storage<float16>(kernels, Storage::f16);
  fill_storage<double>(kernels, Storage::f64);
  return kernels;
}

}  // namespace fused::FUSED_TARGET
