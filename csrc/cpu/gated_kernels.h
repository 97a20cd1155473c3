// The table of the kernels of gated activations for the instruction set that this file is compiled
// for.
#pragma once

#include "gated_backward.h"
#include "gated_forward.h"

namespace fused::FUSED_TARGET {

template <class T>
inline void fill_gated_storage(GatedKernels& kernels, Storage storage) {
  int gate = 0;
#define FUSED_FILL(Gate)                                                               \
  kernels.forward[static_cast<int>(storage)][gate] = GatedForwardKernel<T, Gate>::run; \
  kernels.backward[static_cast<int>(storage)][gate++] = GatedBackwardKernel<T, Gate>::run;
  FUSED_FOR_EACH_GATE(FUSED_FILL)
#undef FUSED_FILL
}

inline GatedKernels make_gated_kernels() {
  GatedKernels kernels{};
  fill_gated_storage<float>(kernels, Storage::f32);
  fill_gated_storage<bfloat16>(kernels, Storage::bf16);
  fill_gated_storage<float16>(kernels, Storage::f16);
  fill_gated_storage<double>(kernels, Storage::f64);
  return kernels;
}

}  // namespace fused::FUSED_TARGET
