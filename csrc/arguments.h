// Reading the arguments of the CPU operators: dtypes, parameters, seed.
#pragma once

#include <cstdint>
#include <optional>

#include "cpu/memory.h"
#include "cpu/stages.h"

namespace fused {

using OptionalTensor = std::optional<torch::stable::Tensor>;

Storage storage_of(const torch::stable::Tensor& tensor);
int32_t dtype_of(const torch::stable::Tensor& tensor);

// The type that a storage type is computed in, and its code in torch.
inline Storage compute_of(Storage storage) {
  return storage == Storage::f64 ? Storage::f64 : Storage::f32;
}
int32_t compute_dtype(Storage storage);

// A (cols,) parameter in the compute type: itself, or converted into a buffer of this thread.
const void* column_array(const OptionalTensor& tensor, Storage compute, int slot, int64_t cols);

// Raises for codes that are unknown or those of gated activations.
void check_activation(int64_t activation);

// What an operator does after h, but for the dropout; the code, one that is known, may be gated.
Stages stages_of(Storage compute, int64_t activation, double alpha, double beta);

// The seed of dropout, after a check of the threshold; 0 without dropout.
uint64_t checked_seed(int64_t threshold, const OptionalTensor& seed);

// Whether an output in rows of `cols` shall bypass the caches: one of half their size cannot stay
// there along with its input.
bool worth_streaming(const torch::stable::Tensor& out, int64_t cols);

}  // namespace fused
