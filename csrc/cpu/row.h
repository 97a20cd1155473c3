// What the row kernels take, and the table of them that each instruction set offers.
#pragma once

#include <cstdint>

#include "stages.h"

namespace fused {

// y = residual + dropout(activation(norm(z + bias) + shortcut)) over (rows, cols).
//
// z, residual, dy, y, dz (storage type): rows of contiguous elements, strides in elements. The
// shortcut and its gradient, dshortcut, are contiguous; a gated activation has none. bias,
// norm_weight, norm_bias, mean, rstd: contiguous, in the compute type (float, or double for
// double); null where absent.
struct RowProblem {
  int64_t cols = 0;
  Norm norm = Norm::none;
  double eps = 0;
  Stages stages;
  const void* z = nullptr;
  int64_t z_stride = 0;
  const void* gate = nullptr;
  int64_t gate_stride = 0;
  const void* bias = nullptr;
  const void* norm_weight = nullptr;
  const void* norm_bias = nullptr;
  const void* shortcut = nullptr;  // may be null
};

struct RowForward : RowProblem {
  const void* residual = nullptr;
  int64_t residual_stride = 0;
  void* y = nullptr;  // may be z itself
  int64_t y_stride = 0;
  void* mean = nullptr;  // written for layer
  void* rstd = nullptr;  // written for layer and rms
};

struct RowBackward : RowProblem {
  const void* dy = nullptr;
  int64_t dy_stride = 0;
  const void* added = nullptr;  // under a norm: what dz gets from elsewhere; may be null
  int64_t added_stride = 0;
  void* dz = nullptr;
  void* dgate = nullptr;
  int64_t dz_stride = 0;      // of both
  void* dshortcut = nullptr;  // under a norm; else it is dz
  const void* mean = nullptr;
  const void* rstd = nullptr;
};

// Sums over the rows of one call, in the compute type, added to what is there; null: not wanted.
struct ColumnSums {
  void* norm_weight;
  void* norm_bias;
  void* bias;
};

// Both work on rows [begin, end). scratch holds forward_scratch(cols) or backward_scratch(cols)
// elements of the compute type.
using ForwardKernel = void (*)(const RowForward&, int64_t begin, int64_t end, void* scratch);
using BackwardKernel = void (*)(const RowBackward&, int64_t begin, int64_t end, const ColumnSums&,
                                void* scratch);

// Forward: a batch of rows that fits in the first-level cache, or one row.
constexpr int64_t kBatchElements = 4096, kMostBatchRows = 8;
constexpr int64_t forward_scratch(int64_t cols) {
  return cols > kBatchElements ? cols : kBatchElements;
}

// Backward: the gradient of one row's normalised values. (Four rows together, so that the sums over
// rows are read and written once for them, spill too many registers: 1.2 to 1.5 times slower by
// bench/costs.py's measure; AMD EPYC 9004, November 2026.)
constexpr int64_t backward_scratch(int64_t cols) { return cols; }

// Of a gated activation z, dz and the parameters have `cols` columns, an even number; residual, y
// and dy have cols / 2, and y is not z. The second half of the columns, the gates, are read behind
// `gate` and written behind `dgate`, which are z and dz or, without a norm, where these columns
// would begin if they were whole rows.
struct RowKernels {
  ForwardKernel forward[kStorages][kThroughs];
  BackwardKernel backward[kStorages][kThroughs];
};

const RowKernels& row_kernels_portable();
const RowKernels& row_kernels_avx2();
const RowKernels& row_kernels_avx512();

}  // namespace fused
