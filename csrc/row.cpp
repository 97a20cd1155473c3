// The CPU implementations of the row operators (schemas: fused/backends/schemas.py), on libtorch's
// stable ABI.
//
// This file allocates and splits the rows over threads; the arithmetic is in cpu/row_forward.h and
// cpu/row_backward.h.
#include <algorithm>
#include <cstring>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "arguments.h"
#include "check.h"
#include "isa.h"
#include "parallel.h"

namespace fused {
namespace {

using torch::stable::Tensor;

struct Scalars {
  int64_t norm;
  double eps;
  int64_t activation;
  double alpha, beta;
  int64_t threshold;
};

void fill_problem(RowProblem& problem, const Tensor& z, const OptionalTensor& bias,
                  const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                  const OptionalTensor& seed, const Scalars& scalars) {
  const Storage compute = compute_of(storage_of(z));
  FUSED_CHECK(z.dim() == 2, "z must be (rows, cols), got ", z.dim(), " dimensions");
  FUSED_CHECK(scalars.norm >= 0 && scalars.norm <= 2, "unknown norm code ", scalars.norm);
  if (!is_gated(scalars.activation)) {
    check_activation(scalars.activation);
  } else {
    FUSED_CHECK(z.size(1) % 2 == 0, "a gated activation halves the columns of z, so ",
                "their number must be even, got ", z.size(1));
  }
  problem.cols = z.size(1);
  problem.norm = static_cast<Norm>(scalars.norm);
  problem.eps = scalars.eps;
  problem.stages = stages_of(compute, scalars.activation, scalars.alpha, scalars.beta);
  problem.stages.threshold = static_cast<uint32_t>(scalars.threshold);
  problem.stages.seed = checked_seed(scalars.threshold, seed);
  problem.z = z.data_ptr();
  problem.z_stride = checked_row_stride(z, z, problem.cols, "z");
  problem.gate = problem.z;
  problem.gate_stride = problem.z_stride;
  problem.bias = column_array(bias, compute, 0, problem.cols);
  problem.norm_weight = column_array(norm_weight, compute, 1, problem.cols);
  problem.norm_bias = column_array(norm_bias, compute, 2, problem.cols);
}

// The columns of y and dy.
int64_t output_cols(const Tensor& z, int64_t activation) {
  return is_gated(activation) ? z.size(1) / 2 : z.size(1);
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

// How many statistics of a row the norm has: mean and rstd, or rstd.
int64_t statistics_of(Norm norm) { return norm == Norm::layer ? 2 : norm == Norm::rms ? 1 : 0; }

// Where mean and rstd are in a (statistics, rows) array of the compute type.
template <class Problem>
void place_statistics(Problem& problem, const void* data, int64_t rows, Storage storage) {
  const size_t size = storage == Storage::f64 ? sizeof(double) : sizeof(float);
  char* start = static_cast<char*>(const_cast<void*>(data));
  problem.mean = problem.norm == Norm::layer ? start : nullptr;
  problem.rstd = problem.norm == Norm::layer ? start + size * static_cast<size_t>(rows) : start;
}

std::tuple<Tensor, Tensor> row_forward(Tensor z, OptionalTensor bias, OptionalTensor norm_weight,
                                       OptionalTensor norm_bias, OptionalTensor residual,
                                       OptionalTensor seed, int64_t norm, double eps,
                                       int64_t activation, double alpha, double beta,
                                       int64_t threshold) {
  RowForward problem;
  fill_problem(problem, z, bias, norm_weight, norm_bias, seed,
               {norm, eps, activation, alpha, beta, threshold});
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
                         int64_t threshold) {
  check_activation(activation);
  RowForward problem;
  fill_problem(problem, z, bias, norm_weight, norm_bias, seed,
               {norm, eps, activation, alpha, beta, threshold});
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

// Column sums are taken over chunks of rows, then over the chunks in order. The chunks depend on
// the number of rows alone, so the bits do not change with the number of threads.
constexpr int64_t kRowsPerChunk = 32, kMaxChunks = 64;

template <class C>
void add_chunks(const C* partial, int64_t chunks, int64_t cols, C* out) {
  parallel_for(0, cols, std::max<int64_t>(64, kGrain / chunks), [&](int64_t begin, int64_t end) {
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const C* row = partial + chunk * cols;
      for (int64_t i = begin; i < end; ++i) out[i] += row[i];
    }
  });
}

// The sum of one parameter's gradient: chunks × cols partials, of which the first row becomes the
// result; an empty tensor where it is not wanted.
struct PartialSum {
  PartialSum(bool wanted, int64_t chunks, int64_t cols, int32_t dtype)
      : partial(new_tensor({wanted ? chunks * cols : 0}, dtype)), wanted(wanted) {
    const size_t bytes = static_cast<size_t>(partial.numel()) * partial.element_size();
    if (bytes) memset(partial.data_ptr(), 0, bytes);  // an empty tensor has no memory
  }
  void* at(int64_t chunk, int64_t cols) const {
    return wanted ? static_cast<char*>(partial.data_ptr()) + chunk * cols * partial.element_size()
                  : nullptr;
  }
  Tensor partial;
  bool wanted;
};

Tensor finish_sum(const PartialSum& sum, int64_t chunks, int64_t cols, Storage compute,
                  const OptionalTensor& like) {
  if (!sum.wanted) return sum.partial;
  if (chunks > 1 && compute == Storage::f64) {
    double* data = static_cast<double*>(sum.partial.data_ptr());
    add_chunks(data, chunks, cols, data);
  } else if (chunks > 1) {
    float* data = static_cast<float*>(sum.partial.data_ptr());
    add_chunks(data, chunks, cols, data);
  }
  const int32_t dtype = dtype_of(*like);
  const bool same_dtype = dtype == compute_dtype(compute);
  if (same_dtype && chunks == 1) return sum.partial;
  Tensor out = new_tensor({cols}, dtype);
  if (cols == 0) return out;
  if (same_dtype) {
    memcpy(out.data_ptr(), sum.partial.data_ptr(), cols * out.element_size());
  } else {
    Tensor first = sum.partial;
    torch::stable::copy_(out, torch::stable::narrow(first, 0, 0, cols));
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> row_backward(
    Tensor dy, Tensor z, OptionalTensor bias, OptionalTensor norm_weight, OptionalTensor norm_bias,
    Tensor statistics, OptionalTensor seed, int64_t wanted, int64_t norm, double eps,
    int64_t activation, double alpha, double beta, int64_t threshold) {
  RowBackward problem;
  fill_problem(problem, z, bias, norm_weight, norm_bias, seed,
               {norm, eps, activation, alpha, beta, threshold});
  const Storage storage = storage_of(z);
  const Storage compute = compute_of(storage);
  const int64_t rows = z.size(0), cols = z.size(1);
  const int32_t dtype = dtype_of(z);
  problem.dy = dy.data_ptr();
  const int64_t dy_cols = output_cols(z, activation);
  problem.dy_stride = checked_row_stride(dy, z, dy_cols, "dy");
  FUSED_CHECK(statistics.numel() == statistics_of(problem.norm) * rows &&
                  (storage_of(statistics) == compute) && statistics.is_contiguous(),
              "statistics must be those of the forward pass");
  place_statistics(problem, statistics.data_ptr(), rows, storage);

  const int64_t per_chunk = std::max(kRowsPerChunk, (rows + kMaxChunks - 1) / kMaxChunks);
  const int64_t chunks = std::max<int64_t>(1, (rows + per_chunk - 1) / per_chunk);
  Tensor dz = new_tensor({rows, cols}, dtype);
  const bool normed = problem.norm != Norm::none;
  const int32_t sum_dtype = compute_dtype(compute);
  const PartialSum dweight(norm_weight && normed && wanted & kWantNormWeight, chunks, cols,
                           sum_dtype);
  const PartialSum dnorm_bias(norm_bias && normed && wanted & kWantNormBias, chunks, cols,
                              sum_dtype);
  const PartialSum dbias(wanted & kWantBias, chunks, cols, sum_dtype);
  if (rows && cols) {
    problem.dz = problem.dgate = dz.data_ptr();
    problem.dz_stride = cols;
    // Without a norm the halves of dz are stored as they come, else whole rows by a second pass.
    problem.stages.streaming = worth_streaming(dz, normed ? cols : dy_cols);
    const int through = static_cast<int>(problem.stages.through);
    const BackwardKernel kernel = active_kernels().row.backward[static_cast<int>(storage)][through];
    const size_t scratch = sizeof(double) * backward_scratch(cols);
    const int64_t grain = std::max<int64_t>(1, kGrain / (per_chunk * cols));
    parallel_for(0, chunks, grain, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) {
        const ColumnSums sums{dweight.at(chunk, cols), dnorm_bias.at(chunk, cols),
                              dbias.at(chunk, cols)};
        kernel(problem, chunk * per_chunk, std::min(rows, (chunk + 1) * per_chunk), sums,
               thread_buffer(3, scratch));
      }
    });
  }
  return {dz, finish_sum(dweight, chunks, cols, compute, norm_weight),
          finish_sum(dnorm_bias, chunks, cols, compute, norm_bias),
          finish_sum(dbias, chunks, cols, compute, z)};
}

}  // namespace

}  // namespace fused

STABLE_TORCH_LIBRARY_IMPL(fused_lnad, CPU, m) {
  m.impl("row_forward", TORCH_BOX(&fused::row_forward));
  m.impl("row_forward_", TORCH_BOX(&fused::row_forward_inplace));
  m.impl("row_backward", TORCH_BOX(&fused::row_backward));
}
