// What the kernels of the channel norms take, and the table of them that each instruction set
// offers.
//
//   h = (z − mean)·scale + shift + shortcut        y = residual + dropout(activation(h))
//   g = the gradient of h, dshortcut               dz = g·scale + (z − mean)·slope + offset
//
// A kernel works on rows of contiguous elements, one after the other in memory. The coefficients
// mean … offset are either one number for a row (a row is a channel of a sample) or arrays along
// the row (a row is all channels of a position), so that batch, group and instance norm are the
// same to it.
#pragma once

#include <cstdint>

#include "stages.h"

namespace fused {

// In the compute type (float, or double for double): one value for each row of a call, or one for
// each column.
struct Coefficients {
  const void* mean = nullptr;
  const void* scale = nullptr;
  const void* shift = nullptr;
  const void* factor = nullptr;  // of dropout of whole channels; null: 1
  const void* slope = nullptr;   // of the gradient kernel
  const void* offset = nullptr;
};

// Rows [0, rows) from each of the pointers on. z, shortcut, dy, residual, out, dshortcut: the
// storage type.
struct ChannelRows {
  int64_t rows = 0, cols = 0;
  int64_t stride = 0;            // elements from a row to the next
  int64_t coefficient_step = 1;  // from a row's coefficients to the next; 0: all have the same
  const void* z = nullptr;
  const void* shortcut = nullptr;  // may be null
  const void* dy = nullptr;        // backward
  const void* residual = nullptr;  // forward; may be null
  void* out = nullptr;             // y, which may be z, or dz; sums kernel: null or dz = g·scale
  void* dshortcut = nullptr;       // written by the sums kernel if not null
  const bool* mask = nullptr;      // per row: false where all is zero; null: all true
  uint64_t counter = 0;            // of the first row's dropout
  uint64_t row_counters = 0;       // by how much it goes on for the next row
  void* gradient = nullptr;        // g in the compute type, written by the sums kernel if not null
  // Σ g and Σ g·(z − mean): two for each row, or for columns two arrays one after the other. Null:
  // not wanted.
  double* sums = nullptr;
  void* scratch = nullptr;  // sums of columns: 2 · cols elements of the compute type
  Coefficients coefficients;
};

using ChannelKernel = void (*)(const Stages&, const ChannelRows&);

// Mean and Σ(z − mean)².
struct Moments {
  double mean, square;
};

// Of `runs` runs of n contiguous elements, `stride` elements apart.
using MomentsKernel = void (*)(const void* z, int64_t runs, int64_t n, int64_t stride, Moments*);
// Of each column over the first `present` rows whose mask (null: all) is true, at least one.
// scratch: 3 · cols elements of the compute type.
using ColumnMomentsKernel = void (*)(const void* z, const bool* mask, int64_t present, int64_t cols,
                                     double* mean, double* square, void* scratch);

enum class By : int { row = 0, column = 1 };  // whose the coefficients are

struct ChannelKernels {
  MomentsKernel moments[kStorages];
  ColumnMomentsKernel column_moments[kStorages];
  ChannelKernel forward[kStorages][2][2];  // [By][Through]
  ChannelKernel sums[kStorages][2][2];
  ChannelKernel gradient[kStorages][2][2];
  ChannelKernel kept_gradient[kStorages][2];  // g is read from ChannelRows::gradient
};

const ChannelKernels& channel_kernels_portable();
const ChannelKernels& channel_kernels_avx2();
const ChannelKernels& channel_kernels_avx512();

}  // namespace fused
