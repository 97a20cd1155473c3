// The second stage of sums, as Python fills it in (fused/cuda_library.py has the same fields).
#pragma once

#include <cstdint>

namespace fused::cuda {

// outs[plane][outer, cols] = Σ over chunks of partial[planes, outer, chunks, cols]. partial is in
// float, or where `wide` in double; each out has its storage type.
struct SumProblem {
  const void* partial;
  void* outs[3];
  int64_t planes, outer, chunks, cols, wide, storages[3];
};

}  // namespace fused::cuda
