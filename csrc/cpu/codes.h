// The codes of norms, activations and storage types, as the operators and kernels share them.
#pragma once

#include <cstdint>

namespace fused {

// fused/spec.py
enum class Norm : int { none = 0, layer = 1, rms = 2, batch = 3, group = 4, instance = 5 };
constexpr int kActivations = 16;
constexpr int kGelu = 6, kSilu = 8;
// a·gate(b) of the halves (a, b) of a row: codes of their own, after those of the activations.
constexpr int kFirstGated = kActivations, kGatedActivations = 5;
constexpr int kActivationCodes = kFirstGated + kGatedActivations;
constexpr bool is_gated(int64_t activation) {
  return activation >= kFirstGated && activation < kActivationCodes;
}

enum class Storage : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };
constexpr int kStorages = 4;

// Which sums the backward operators make (fused/spec.py).
constexpr int64_t kWantNormWeight = 1, kWantNormBias = 2, kWantBias = 4;

}  // namespace fused
