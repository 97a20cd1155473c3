// The forward row kernel: norm, activation, dropout and residual in one pass over rows that stay in
// cache. z is read once from memory; statistics take two passes over the cached rows, then one more
// normalises, activates, drops and stores. Of a gated activation, statistics are those of all 2N
// columns, and that pass goes over the N columns of y.
#pragma once

#include "epilogue.h"
#include "row_statistics.h"

namespace fused::FUSED_TARGET {

template <class T, Through kThrough>
struct RowForwardKernel : RowBase<T> {
  using Base = RowBase<T>;
  using Base::array;
  using typename Base::C;
  using typename Base::V;

  static void run(const RowForward& problem, int64_t begin, int64_t end, void* scratch_) {
    // Copies: a store through a pointer could change what is behind a reference, so the compiler
    // would load it again for every vector.
    C* const scratch = static_cast<C*>(scratch_);
    const int64_t cols = problem.cols, z_stride = problem.z_stride;
    const int64_t gate_stride = problem.gate_stride;
    const int64_t y_cols = kThrough == Through::gate ? cols / 2 : cols;
    const bool normed = problem.norm != Norm::none;
    const bool copied = normed && Base::must_copy(problem);
    const C *const bias = array(problem.bias), *const weight = array(problem.norm_weight),
                   *const shift = array(problem.norm_bias);
    const int64_t batch = Base::batch_rows(cols);
    Epilogue<T, kThrough> epilogue(problem.stages);

    for (int64_t first = begin; first < end; first += batch) {
      const int64_t last = std::min(end, first + batch);
      if (normed) Base::statistics(problem, first, last, scratch);
      for (int64_t row = first; row < last; ++row) {
        const T* const z = static_cast<const T*>(problem.z) + row * z_stride;
        const T* const gate = static_cast<const T*>(problem.gate) + row * gate_stride;
        const int64_t ahead = row + batch < end ? batch : 0;
        const T* const residual = static_cast<const T*>(problem.residual);
        const RowInput<T> input{{},
                                z,
                                z + ahead * z_stride,
                                copied ? scratch + (row - first) * cols : nullptr,
                                bias,
                                weight,
                                shift,
                                normed,
                                Base::statistics_of(problem, row),
                                gate,
                                gate + ahead * gate_stride,
                                Base::shortcut_of(problem, row)};
        epilogue.output(y_cols, input,
                        {static_cast<T*>(problem.y) + row * problem.y_stride,
                         residual ? residual + row * problem.residual_stride : nullptr,
                         static_cast<uint64_t>(row * counters_of(y_cols))});
      }
    }
    if (problem.stages.streaming) fence_streaming();
  }
};

}  // namespace fused::FUSED_TARGET
