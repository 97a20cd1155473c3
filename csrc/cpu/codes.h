// The codes of norms, activations and storage types, as the operators and kernels share them.
#pragma once

#include <cstdint>

namespace fused {

// fused/spec.py
enum class Norm : int { none = 0, layer = 1, rms = 2, batch = 3, group = 4, instance = 5 };
constexpr int kActivations = 16;

enum class Storage : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };
constexpr int kStorages = 4;

// Which sums the backward operators make (fused/ops.py).
constexpr int64_t kWantNormWeight = 1, kWantNormBias = 2, kWantBias = 4;

}  // namespace fused
