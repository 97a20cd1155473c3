// The CPU implementation of add & norm (schemas: fused/backends/schemas.py):
//
//   h = residual + dropout(x),  y = norm(h)
//
// Each is a row operation without the other's part, so the row kernels serve both, one after the
// other for a block of rows that stays in cache: x and residual are read once from memory, h and y
// are written once.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "row_problem.h"

namespace fused {
namespace {

// Elements of h that are written by one kernel and read by the next, which the second-level cache
// holds.
constexpr int64_t kBlockElements = 16384;

int64_t block_rows(int64_t cols) { return std::max<int64_t>(1, kBlockElements / cols); }

int kernel_of(const RowProblem& problem) { return static_cast<int>(problem.stages.through); }

std::tuple<Tensor, Tensor, Tensor> add_norm_forward(Tensor x, Tensor residual,
                                                    OptionalTensor norm_weight,
                                                    OptionalTensor norm_bias, OptionalTensor seed,
                                                    int64_t norm, double eps, int64_t threshold) {
  RowForward add, normalize;
  fill_problem(add, x, {}, {}, {}, seed, {0, 0.0, 0, 0.0, 0.0, threshold});
  const Storage storage = storage_of(x);
  const int64_t rows = x.size(0), cols = x.size(1);
  Tensor h = new_tensor({rows, cols}, dtype_of(x)), y = new_tensor({rows, cols}, dtype_of(x));
  fill_problem(normalize, h, {}, norm_weight, norm_bias, {}, {norm, eps, 0, 0.0, 0.0, 0});
  Tensor statistics = new_tensor({statistics_of(normalize.norm), rows}, compute_dtype(storage));
  if (!rows || !cols) {
    if (statistics.numel()) {
      memset(statistics.data_ptr(), 0,
             static_cast<size_t>(statistics.numel()) * statistics.element_size());
    }
    return {y, h, statistics};
  }
  add.residual = residual.data_ptr();
  add.residual_stride = checked_row_stride(residual, x, cols, "residual");
  add.y = h.data_ptr();
  normalize.y = y.data_ptr();
  add.y_stride = normalize.y_stride = cols;
  place_statistics(normalize, statistics.data_ptr(), rows, storage);
  normalize.stages.streaming = worth_streaming(y, cols);
  const auto& kernels = active_kernels().row.forward[static_cast<int>(storage)];
  const ForwardKernel first = kernels[kernel_of(add)], second = kernels[kernel_of(normalize)];
  const size_t scratch = sizeof(double) * forward_scratch(cols);
  const int64_t block = block_rows(cols), blocks = (rows + block - 1) / block;
  parallel_for(0, blocks, std::max<int64_t>(1, kGrain / (block * cols)),
               [&](int64_t begin, int64_t end) {
                 void* const buffer = thread_buffer(3, scratch);
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t from = i * block, to = std::min(rows, from + block);
                   first(add, from, to, buffer);
                   second(normalize, from, to, buffer);
                 }
               });
  return {y, h, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_norm_backward(
    Tensor dy, OptionalTensor dh, Tensor h, OptionalTensor norm_weight, OptionalTensor norm_bias,
    Tensor statistics, OptionalTensor seed, int64_t wanted, int64_t norm, double eps,
    int64_t threshold) {
  RowBackward normalize, drop;
  fill_problem(normalize, h, {}, norm_weight, norm_bias, {}, {norm, eps, 0, 0.0, 0.0, 0});
  const Storage storage = storage_of(h), compute = compute_of(storage);
  const int64_t rows = h.size(0), cols = h.size(1);
  place_gradient(normalize, dy, h, cols, statistics);
  if (dh) {
    normalize.added = dh->data_ptr();
    normalize.added_stride = checked_row_stride(*dh, h, cols, "dh");
  }
  const bool drops = threshold != 0;
  Tensor dresidual = new_tensor({rows, cols}, dtype_of(h));
  Tensor dx = drops ? new_tensor({rows, cols}, dtype_of(h)) : new_tensor({0}, dtype_of(h));
  const RowSums sums(rows, cols, compute, norm_weight && wanted & kWantNormWeight,
                     norm_bias && wanted & kWantNormBias, wanted & kWantBias);
  if (rows && cols) {
    write_gradient(normalize, dresidual);
    if (drops) {
      // What dropout reads of x, nothing, is nowhere: h is as good.
      fill_problem(drop, h, {}, {}, {}, seed, {0, 0.0, 0, 0.0, 0.0, threshold});
      drop.dy = dresidual.data_ptr();
      drop.dy_stride = cols;
      write_gradient(drop, dx);
    }
    (drops ? drop : normalize).stages.streaming = worth_streaming(drops ? dx : dresidual, cols);
    const auto& kernels = active_kernels().row.backward[static_cast<int>(storage)];
    const BackwardKernel first = kernels[kernel_of(normalize)], second = kernels[kernel_of(drop)];
    sums.run([&](int64_t begin, int64_t end, const ColumnSums& into, void* scratch) {
      if (!drops) return first(normalize, begin, end, into, scratch);
      const int64_t block = block_rows(cols);
      for (int64_t from = begin; from < end; from += block) {
        const int64_t to = std::min(end, from + block);
        first(normalize, from, to, {into.norm_weight, into.norm_bias, nullptr}, scratch);
        second(drop, from, to, {nullptr, nullptr, into.bias}, scratch);
      }
    });
  }
  return {dx, dresidual, sums.finish(sums.norm_weight, norm_weight),
          sums.finish(sums.norm_bias, norm_bias), sums.finish(sums.bias, h)};
}

}  // namespace
}  // namespace fused

STABLE_TORCH_LIBRARY_IMPL(fused_lnad, CPU, m) {
  m.impl("add_norm_forward", TORCH_BOX(&fused::add_norm_forward));
  m.impl("add_norm_backward", TORCH_BOX(&fused::add_norm_backward));
}
