// The CPU implementations of the row operators (schemas: fused/backends/schemas.py), on libtorch's
// stable ABI.
//
// This file allocates and splits the rows over threads; the arithmetic is in cpu/row_forward.h and
// cpu/row_backward.h.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "row_problem.h"

namespace fused {
namespace {

// The columns of y and dy.
int64_t output_cols(const Tensor& z, int64_t activation) {
  return is_gated(activation) ? z.size(1) / 2 : z.size(1);
}

void set_shortcut(RowProblem& problem, const OptionalTensor& shortcut, const Tensor& z) {
  if (!shortcut) return;
  FUSED_CHECK(
      problem.stages.through != Through::gate,
      "a gated activation takes no shortcut; add it as the norm's residual, and gate after");
  FUSED_CHECK(shortcut->is_contiguous(), "shortcut must be contiguous");
  checked_row_stride(*shortcut, z, problem.cols, "shortcut");
  problem.shortcut = shortcut->data_ptr();
}

// ---- forward ----

void run_forward(const RowForward& problem, int64_t rows, Storage storage) {
  const int through = static_cast<int>(problem.stages.through);
  const ForwardKernel kernel = active_kernels().row.forward[static_cast<int>(storage)][through];
  const size_t scratch = sizeof(double) * forward_scratch(problem.cols);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, problem.cols));
  parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    kernel(problem, begin, end, thread_buffer(3, scratch));
  });
}

std::tuple<Tensor, Tensor> row_forward(Tensor z, OptionalTensor bias, OptionalTensor norm_weight,
                                       OptionalTensor norm_bias, OptionalTensor residual,
                                       OptionalTensor seed, int64_t norm, double eps,
                                       int64_t activation, double alpha, double beta,
                                       int64_t threshold, OptionalTensor shortcut) {
  RowForward problem;
  fill_problem(problem, z, bias, norm_weight, norm_bias, seed,
               {norm, eps, activation, alpha, beta, threshold});
  set_shortcut(problem, shortcut, z);
  const Storage storage = storage_of(z);
  const int64_t rows = z.size(0), cols = z.size(1);
  const int32_t dtype = dtype_of(z);
  const int64_t y_cols = output_cols(z, activation);
  Tensor y = new_tensor({rows, y_cols}, dtype);
  Tensor statistics = new_tensor({statistics_of(problem.norm), rows}, compute_dtype(storage));
  if (rows && cols) {
    if (residual) {
      problem.residual = residual->data_ptr();
      problem.residual_stride = checked_row_stride(*residual, z, y_cols, "residual");
    }
    problem.y = y.data_ptr();
    problem.y_stride = y_cols;
    place_statistics(problem, statistics.data_ptr(), rows, storage);
    problem.stages.streaming = worth_streaming(y, y_cols);
    run_forward(problem, rows, storage);
  } else if (statistics.numel()) {  // rows without elements
    memset(statistics.data_ptr(), 0,
           static_cast<size_t>(statistics.numel()) * statistics.element_size());
  }
  return {y, statistics};
}

// Writes y over z, for inference: no output to allocate, no fresh pages to touch.
void row_forward_inplace(Tensor z, OptionalTensor bias, OptionalTensor norm_weight,
                         OptionalTensor norm_bias, OptionalTensor residual, OptionalTensor seed,
                         int64_t norm, double eps, int64_t activation, double alpha, double beta,
                         int64_t threshold, OptionalTensor shortcut) {
  check_activation(activation);
  RowForward problem;
  fill_problem(problem, z, bias, norm_weight, norm_bias, seed,
               {norm, eps, activation, alpha, beta, threshold});
  set_shortcut(problem, shortcut, z);
  const Storage storage = storage_of(z);
  const int64_t rows = z.size(0);
  if (!rows || !z.size(1)) return;
  if (residual) {
    problem.residual = residual->data_ptr();
    problem.residual_stride = checked_row_stride(*residual, z, problem.cols, "residual");
  }
  problem.y = z.data_ptr();
  problem.y_stride = problem.z_stride;
  place_statistics(problem, thread_buffer(4, 2 * sizeof(double) * rows), rows, storage);
  run_forward(problem, rows, storage);
}

// ---- backward ----

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_backward(
    Tensor dy, Tensor z, OptionalTensor bias, OptionalTensor norm_weight, OptionalTensor norm_bias,
    Tensor statistics, OptionalTensor seed, int64_t wanted, int64_t norm, double eps,
    int64_t activation, double alpha, double beta, int64_t threshold, OptionalTensor shortcut) {
  RowBackward problem;
  fill_problem(problem, z, bias, norm_weight, norm_bias, seed,
               {norm, eps, activation, alpha, beta, threshold});
  set_shortcut(problem, shortcut, z);
  const Storage storage = storage_of(z);
  const Storage compute = compute_of(storage);
  const int64_t rows = z.size(0), cols = z.size(1);
  const int32_t dtype = dtype_of(z);
  const int64_t dy_cols = output_cols(z, activation);
  place_gradient(problem, dy, z, dy_cols, statistics);
  Tensor dz = new_tensor({rows, cols}, dtype);
  const bool normed = problem.norm != Norm::none, apart = shortcut && normed;
  Tensor dshortcut =
      apart ? new_tensor({rows, cols}, dtype) : new_tensor({0}, dtype);  // without a norm, dz
  const RowSums sums(rows, cols, compute, norm_weight && normed && wanted & kWantNormWeight,
                     norm_bias && normed && wanted & kWantNormBias, wanted & kWantBias);
  if (rows && cols) {
    write_gradient(problem, dz);
    if (apart) problem.dshortcut = dshortcut.data_ptr();
    // Without a norm the halves of dz are stored as they come, else whole rows by a second pass.
    problem.stages.streaming = worth_streaming(dz, normed ? cols : dy_cols);
    const int through = static_cast<int>(problem.stages.through);
    const BackwardKernel kernel = active_kernels().row.backward[static_cast<int>(storage)][through];
    sums.run([&](int64_t begin, int64_t end, const ColumnSums& into, void* scratch) {
      kernel(problem, begin, end, into, scratch);
    });
  }
  return {dz, sums.finish(sums.norm_weight, norm_weight), sums.finish(sums.norm_bias, norm_bias),
          sums.finish(sums.bias, z), dshortcut};
}

}  // namespace

}  // namespace fused

STABLE_TORCH_LIBRARY_IMPL(fused_lnad, CPU, m) {
  m.impl("row_forward", TORCH_BOX(&fused::row_forward));
  m.impl("row_forward_", TORCH_BOX(&fused::row_forward_inplace));
  m.impl("row_backward", TORCH_BOX(&fused::row_backward));
}
