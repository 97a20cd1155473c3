// Gated activations for the elements that one thread holds: a·act(b), and the gradients of both.
#pragma once

#include "epilogue.cuh"

namespace fused::cuda {

// The codes of fused/spec.py.
enum GateCode {
  kBeforeGates = kFirstGated - 1,
#define FUSED_CODE(A) kGate##A,
  FUSED_FOR_EACH_GATE(FUSED_CODE)
#undef FUSED_CODE
};

// a becomes a·act(b).
template <class C, int N>
__device__ inline void gate(int64_t code, C (&a)[N], const C (&b)[N]) {
  const ActivationParameters<C> none{};
  switch (static_cast<int>(code)) {
#define FUSED_CASE(A)                                                                 \
  case kGate##A:                                                                      \
    _Pragma("unroll") for (int k = 0; k < N; ++k) a[k] = a[k] * A::value(b[k], none); \
    break;
    FUSED_FOR_EACH_GATE(FUSED_CASE)
#undef FUSED_CASE
  }
}

// Given the gradient g of a·act(b), a becomes its own gradient and b its own.
template <class C, int N>
__device__ inline void gate_gradient(int64_t code, const C (&g)[N], C (&a)[N], C (&b)[N]) {
  const ActivationParameters<C> none{};
  switch (static_cast<int>(code)) {
#define FUSED_CASE(A)                               \
  case kGate##A:                                    \
    _Pragma("unroll") for (int k = 0; k < N; ++k) { \
      const C value = A::value(b[k], none);         \
      b[k] = A::gradient(g[k] * a[k], b[k], none);  \
      a[k] = g[k] * value;                          \
    }                                               \
    break;
    FUSED_FOR_EACH_GATE(FUSED_CASE)
#undef FUSED_CASE
  }
}

}  // namespace fused::cuda
