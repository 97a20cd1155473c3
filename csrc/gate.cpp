// The CPU implementations of the gate of two tensors (schemas: fused/backends/schemas.py), by the
// row kernels of gated activations without a norm.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "row_problem.h"

namespace fused {
namespace {

// Where the rows of a tensor would begin if `cols` columns lay in front of them.
char* in_front(const Tensor& tensor, int64_t cols) {
  return static_cast<char*>(tensor.data_ptr()) - cols * tensor.element_size();
}

void fill_pair(RowProblem& problem, const Tensor& value, const Tensor& gate,
               const OptionalTensor& seed, int64_t activation, int64_t threshold) {
  FUSED_CHECK(value.dim() == 2, "value must be (rows, cols), got ", value.dim(), " dimensions");
  FUSED_CHECK(is_gated(activation), "unknown code of a gated activation ", activation);
  const int64_t cols = value.size(1);
  problem.cols = 2 * cols;
  problem.z_stride = checked_row_stride(value, value, cols, "value");
  problem.gate_stride = checked_row_stride(gate, value, cols, "gate");
  problem.stages = stages_of(compute_of(storage_of(value)), activation, 0, 0);
  problem.stages.threshold = static_cast<uint32_t>(threshold);
  problem.stages.seed = checked_seed(threshold, seed);
  problem.z = value.data_ptr();
  problem.gate = in_front(gate, cols);
}

int64_t grain_of(int64_t cols) { return std::max<int64_t>(1, kGrain / (2 * cols)); }

Tensor gate_forward(Tensor value, Tensor gate, OptionalTensor seed, int64_t activation,
                    int64_t threshold) {
  RowForward problem;
  fill_pair(problem, value, gate, seed, activation, threshold);
  const int64_t rows = value.size(0), cols = value.size(1);
  Tensor y = new_tensor({rows, cols}, dtype_of(value));
  if (!rows || !cols) return y;
  problem.y = y.data_ptr();
  problem.y_stride = cols;
  problem.stages.streaming = worth_streaming(y, cols);
  const ForwardKernel kernel =
      active_kernels()
          .row.forward[static_cast<int>(storage_of(value))][static_cast<int>(Through::gate)];
  parallel_for(0, rows, grain_of(cols),
               [&](int64_t begin, int64_t end) { kernel(problem, begin, end, nullptr); });
  return y;
}

std::tuple<Tensor, Tensor> gate_backward(Tensor dy, Tensor value, Tensor gate, OptionalTensor seed,
                                         int64_t activation, int64_t threshold, bool joined) {
  RowBackward problem;
  fill_pair(problem, value, gate, seed, activation, threshold);
  const int64_t rows = value.size(0), cols = value.size(1);
  problem.dy_stride = checked_row_stride(dy, value, cols, "dy");
  problem.dz_stride = joined ? 2 * cols : cols;
  Tensor dvalue = new_tensor({rows, problem.dz_stride}, dtype_of(value));
  Tensor dgate = new_tensor({joined ? 0 : rows, cols}, dtype_of(value));
  if (!rows || !cols) return {dvalue, dgate};
  problem.dy = dy.data_ptr();
  problem.dz = joined ? in_front(dvalue, -cols) : static_cast<char*>(dvalue.data_ptr());
  problem.dgate = in_front(joined ? dvalue : dgate, cols);
  problem.stages.streaming =
      worth_streaming(dvalue, cols) && (joined || worth_streaming(dgate, cols));
  const BackwardKernel kernel =
      active_kernels()
          .row.backward[static_cast<int>(storage_of(value))][static_cast<int>(Through::gate)];
  parallel_for(0, rows, grain_of(cols),
               [&](int64_t begin, int64_t end) { kernel(problem, begin, end, {}, nullptr); });
  return {dvalue, dgate};
}

}  // namespace
}  // namespace fused

STABLE_TORCH_LIBRARY_IMPL(fused_lnad, CPU, m) {
  m.impl("gate_forward", TORCH_BOX(&fused::gate_forward));
  m.impl("gate_backward", TORCH_BOX(&fused::gate_backward));
}
