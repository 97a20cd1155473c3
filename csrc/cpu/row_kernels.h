// The table of the row kernels for the instruction set that this file is compiled for.
#pragma once

#include "row_backward.h"
#include "row_forward.h"

namespace fused::FUSED_TARGET {

template <class T, Through kThrough>
inline void fill_through(RowKernels& kernels, Storage storage_, Through slot) {
  const int storage = static_cast<int>(storage_), through = static_cast<int>(slot);
  kernels.forward[storage][through] = RowForwardKernel<T, kThrough>::run;
  kernels.backward[storage][through] = RowBackwardKernel<T, kThrough>::run;
}

template <class T>
inline void fill_storage(RowKernels& kernels, Storage storage) {
  using enum Through;
  fill_through<T, kCheapest<T>>(kernels, storage, comparison);
  fill_through<T, stage>(kernels, storage, stage);
  fill_through<T, gate>(kernels, storage, gate);
  constexpr bool is_double = std::is_same_v<T, double>;
  fill_through<T, is_double ? stage : gelu>(kernels, storage, gelu);
  fill_through<T, is_double ? stage : silu>(kernels, storage, silu);
}

inline RowKernels make_row_kernels() {
#if FUSED_AVX512
  RowKernels kernels =
      row_kernels_avx2();  // for double, of which a vector is one in every instruction set
#else
  RowKernels kernels{};
  fill_storage<double>(kernels, Storage::f64);
#endif
  fill_storage<float>(kernels, Storage::f32);
  fill_storage<bfloat16>(kernels, Storage::bf16);
  fill_storage<float16>(kernels, Storage::f16);
  return kernels;
}

}  // namespace fused::FUSED_TARGET
