// Activations as stages: functions that work on blocks of a row, which the kernels of every family
// call, so that each activation is compiled for float and double once, and not once more for every
// kernel and storage type.
#pragma once

#include <cstdint>

#include "codes.h"

namespace fused {

// Of n elements in the compute type, each stage makes `out`, which may be one of its inputs:
//   value     activation(h)
//   gradient  the gradient of h, given g, that of activation(h)
//   gate      a·gate(b)
//   gate_gradient  the gradients of a (in its place) and of b (in its place), given g, that of
//                  a·gate(b), or out of place
// Blocks are whole vectors: n is a multiple of their length or what lies behind is worked on, too.
using ValueStage = void (*)(void* out, const void* h, int64_t n, double alpha, double beta);
using GradientStage = void (*)(void* out, const void* g, const void* h, int64_t n, double alpha,
                               double beta);
using GateStage = void (*)(void* out, const void* a, const void* b, int64_t n);
using GateGradientStage = void (*)(void* da, void* db, const void* g, const void* a, const void* b,
                                   int64_t n);

struct StageTable {
  ValueStage value[2][kActivations];  // float, double
  GradientStage gradient[2][kActivations];
  GateStage gate[2][kGatedActivations];
  GateGradientStage gate_gradient[2][kGatedActivations];
};

// How a kernel is compiled: for an activation that is none or relu, which is a comparison with
// alpha; for any other; or for a gated one. The row kernels have gelu and silu inside as well: a
// row that comes from memory is read and written while they are computed, not before and after.
enum class Through : int { comparison = 0, stage = 1, gate = 2, gelu = 3, silu = 4 };
constexpr int kThroughs = 5;

// What follows h, the same in all calls of an operator: y = residual + dropout(activation(h)).
struct Stages {
  Through through = Through::comparison;
  ValueStage value = nullptr;
  GradientStage gradient = nullptr;
  GateStage gate = nullptr;
  GateGradientStage gate_gradient = nullptr;
  double alpha = 0, beta = 0;
  uint32_t threshold = 0;  // dropout of elements; 0: none, 65536: everything is dropped
  uint64_t seed = 0;
  // Write past the caches: rows of the output, or what is written of them at a time, are 64-byte
  // aligned.
  bool streaming = false;
};

const StageTable& stages_portable();
const StageTable& stages_avx2();
const StageTable& stages_avx512();

}  // namespace fused
