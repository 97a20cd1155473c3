// What the forward and backward kernels of gated activations share: h of one half of a pack.
//
// A row of z has 2N columns, of which the first N are the value a and the others the gate b; the
// kernels go over N columns and work on the packs of both halves that belong together.
#pragma once

#include "row_statistics.h"
// After pack.h, as norm.h.
#include "../activation.h"

namespace fused::FUSED_TARGET {

// Calls body(k, i) for each vector k of a pack, i being its first column.
template <int kCount, class V, class F>
FUSED_INLINE inline void each_vector(const V (&)[kCount], int64_t start, const F& body) {
#pragma GCC unroll 4
  for (int k = 0; k < kCount; ++k) body(k, start + k * kLanesOf<V>);
}

// h = x·weight + shift, where they are present.
template <int kCount, class V, class C, class N>
FUSED_INLINE inline void scale_and_shift(V (&h)[kCount], const C* weight, const C* shift,
                                         int64_t start, N n) {
  if (weight && shift) {
    each_vector(h, start, [&](int k, int64_t i) FUSED_INLINE {
      h[k] = h[k] * load(weight + i, n) + load(shift + i, n);
    });
  } else if (weight) {
    each_vector(h, start, [&](int k, int64_t i) FUSED_INLINE { h[k] *= load(weight + i, n); });
  } else if (shift) {
    each_vector(h, start, [&](int k, int64_t i) FUSED_INLINE { h[k] += load(shift + i, n); });
  }
}

}  // namespace fused::FUSED_TARGET
