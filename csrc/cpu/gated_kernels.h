// The part of the table of row kernels that is of gated activations, for the instruction set that
// this file is compiled for.
#pragma once

#include "gated_backward.h"
#include "gated_forward.h"

namespace fused::FUSED_TARGET {

template <class T>
inline void add_gated_storage(RowKernels& kernels, Storage storage) {
  int code = kFirstGated;
#define FUSED_FILL(Gate)                                                               \
  kernels.forward[static_cast<int>(storage)][code] = GatedForwardKernel<T, Gate>::run; \
  kernels.backward[static_cast<int>(storage)][code++] = GatedBackwardKernel<T, Gate>::run;
  FUSED_FOR_EACH_GATE(FUSED_FILL)
#undef FUSED_FILL
}

inline void add_gated_kernels(RowKernels& kernels) {
  add_gated_storage<float>(kernels, Storage::f32);
  add_gated_storage<bfloat16>(kernels, Storage::bf16);
  add_gated_storage<float16>(kernels, Storage::f16);
  add_gated_storage<double>(kernels, Storage::f64);
}

}  // namespace fused::FUSED_TARGET
