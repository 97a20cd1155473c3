// The row norms: how an element is normalised, and how its gradient comes back.
//
//   layer: x̂ = (x − mean)·rstd    dx = rstd·(g − mean(g) − x̂·mean(g·x̂))
//   rms:   x̂ = x·rstd             dx = rstd·(g − x̂·mean(g·x̂))
//   none:  x̂ = x                  dx = g
//
// g is the gradient of x̂. Ba et al., "Layer Normalization", 2016; Zhang and Sennrich, "Root Mean
// Square Layer Normalization", 2019. rms and none are layer with mean = 0, mean(g) = 0, and for
// none also rstd = 1, mean(g·x̂) = 0, so one formula serves the three.
#pragma once

#include "device.h"

namespace fused::FUSED_TARGET {

template <class V>
struct RowStatistics {
  V mean, rstd;
};

template <class V>
FUSED_DEVICE inline V normalize(V x, const RowStatistics<V>& row) {
  // The difference first: folding mean·rstd into one addend loses digits where mean ≫ deviation.
  return (x - row.mean) * row.rstd;
}

template <class V>
FUSED_DEVICE inline V normalize_gradient(V g, V normalized, V mean_g, V mean_gx,
                                         const RowStatistics<V>& row) {
  return (g - mean_g - normalized * mean_gx) * row.rstd;
}

}  // namespace fused::FUSED_TARGET
