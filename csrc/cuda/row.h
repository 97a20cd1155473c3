// A problem of the row kernels, as Python fills it in (fused/cuda_library.py has the same fields).
#pragma once

#include <cstdint>

namespace fused::cuda {

// All but partial are as in fused/ops.py. A pointer is null where a tensor is absent; strides are
// those of rows, in elements.
struct RowProblem {
  const void *z, *dy, *residual, *bias, *norm_weight, *norm_bias, *seed;
  void* out;         // y, or dz
  void* statistics;  // (planes, rows), in the compute type: mean and rstd, or rstd
  void* means;       // (2, rows), in the compute type: of g and of g·x̂ along each row
  void* partial;     // (sums wanted, chunks, cols), in the compute type: of chunks of rows
  int64_t rows, cols, z_stride, dy_stride, residual_stride, out_stride, chunks;
  int64_t storage,
      wide;  // wide: the bits (kWant in codes.h) of parameters that are in the compute type
  int64_t norm, activation, threshold;
  int64_t wanted;  // the same bits: the planes of partial, in this order
  double eps, alpha, beta;
};

}  // namespace fused::cuda
