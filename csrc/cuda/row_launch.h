// Launching of kernels that go over rows, with one or two halves of `cols` columns.
#pragma once

#include "launch.h"

namespace fused::cuda {

// Whether every pack of every row is a whole one, at a multiple of 16 bytes or of its own size.
inline bool whole_packs(const RowProblem& p, int64_t cols, int pack) {
  const bool even =
      (cols | p.z_stride | p.dy_stride | p.residual_stride | p.out_stride) % pack == 0;
  return even && aligned(p.z, p.dy, p.residual, p.out, p.bias, p.norm_weight, p.norm_bias);
}

}  // namespace fused::cuda
