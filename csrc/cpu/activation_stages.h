// The stages of all activations for the instruction set that this file is compiled for.
#pragma once

#include "pack.h"
#include "stages.h"
// After pack.h: its templates need the functions of the vector type declared.
#include "../activation.h"

namespace fused::FUSED_TARGET {

template <class C, class Activation>
struct ActivationStages {
  using V = Vector<C>;
  using Parameters = ActivationParameters<V>;

  static V at(const void* p, int64_t i) { return load(static_cast<const C*>(p) + i, All<V>{}); }
  static void put(void* p, int64_t i, V x) { store(static_cast<C*>(p) + i, x, All<V>{}); }

  // One vector after the other: they are independent, so the processor overlaps them by itself.
  static void value(void* out, const void* h, int64_t n, double alpha, double beta) {
    const Parameters given{broadcast<V>(alpha), broadcast<V>(beta)};
    for (int64_t i = 0; i < n; i += kLanesOf<V>) put(out, i, Activation::value(at(h, i), given));
  }

  static void gradient(void* out, const void* g, const void* h, int64_t n, double alpha,
                       double beta) {
    const Parameters given{broadcast<V>(alpha), broadcast<V>(beta)};
    for (int64_t i = 0; i < n; i += kLanesOf<V>) {
      put(out, i, Activation::gradient(at(g, i), at(h, i), given));
    }
  }

  // No gate has parameters.
  static void gate(void* out, const void* a, const void* b, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanesOf<V>) {
      put(out, i, at(a, i) * Activation::value(at(b, i), Parameters{}));
    }
  }

  static void gate_gradient(void* da, void* db, const void* g_, const void* a_, const void* b_,
                            int64_t n) {
    for (int64_t i = 0; i < n; i += kLanesOf<V>) {
      const V g = at(g_, i), a = at(a_, i), b = at(b_, i);
      // In this order the compiler shares what is the same in both.
      const V to_b = Activation::gradient(g * a, b, Parameters{});
      put(da, i, g * Activation::value(b, Parameters{}));
      put(db, i, to_b);
    }
  }
};

template <class C>
inline void fill_stages(StageTable& table, int compute) {
  int code = 0, gate = 0;
#define FUSED_FILL(Activation)                                         \
  table.value[compute][code] = ActivationStages<C, Activation>::value; \
  table.gradient[compute][code++] = ActivationStages<C, Activation>::gradient;
  FUSED_FOR_EACH_ACTIVATION(FUSED_FILL)
#undef FUSED_FILL
#define FUSED_FILL(Gate)                                       \
  table.gate[compute][gate] = ActivationStages<C, Gate>::gate; \
  table.gate_gradient[compute][gate++] = ActivationStages<C, Gate>::gate_gradient;
  FUSED_FOR_EACH_GATE(FUSED_FILL)
#undef FUSED_FILL
}

inline StageTable make_stages() {
#if FUSED_AVX512
  StageTable table = stages_avx2();  // for double
#else
  StageTable table{};
  fill_stages<double>(table, 1);
#endif
  fill_stages<float>(table, 0);
  return table;
}

}  // namespace fused::FUSED_TARGET
