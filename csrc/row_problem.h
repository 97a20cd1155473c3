// What the row operators share: their arguments as the kernels take them, and sums over the rows.
#pragma once

#include <algorithm>
#include <cstring>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "arguments.h"
#include "check.h"
#include "isa.h"
#include "parallel.h"

namespace fused {

using torch::stable::Tensor;

// Of z itself, or of another tensor with its rows and `cols` columns.
inline int64_t checked_row_stride(const Tensor& tensor, const Tensor& like, int64_t cols,
                                  const char* name) {
  FUSED_CHECK(tensor.dim() == 2 && tensor.size(0) == like.size(0) && tensor.size(1) == cols, name,
              " must be (", like.size(0), ", ", cols, ")");
  FUSED_CHECK(tensor.stride(1) == 1 || tensor.size(1) <= 1, name, " must have contiguous rows");
  FUSED_CHECK(tensor.scalar_type() == like.scalar_type(), name,
              " must have the dtype of the others");
  return tensor.stride(0);
}

struct Scalars {
  int64_t norm;
  double eps;
  int64_t activation;
  double alpha, beta;
  int64_t threshold;
};

inline void fill_problem(RowProblem& problem, const Tensor& z, const OptionalTensor& bias,
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

// How many statistics of a row the norm has: mean and rstd, or rstd.
inline int64_t statistics_of(Norm norm) {
  return norm == Norm::layer ? 2 : norm == Norm::rms ? 1 : 0;
}

// Where mean and rstd are in a (statistics, rows) array of the compute type.
template <class Problem>
void place_statistics(Problem& problem, const void* data, int64_t rows, Storage storage) {
  const size_t size = storage == Storage::f64 ? sizeof(double) : sizeof(float);
  char* start = static_cast<char*>(const_cast<void*>(data));
  problem.mean = problem.norm == Norm::layer ? start : nullptr;
  problem.rstd = problem.norm == Norm::layer ? start + size * static_cast<size_t>(rows) : start;
}

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

// The gradient of a row's output, and the statistics that the forward pass returned.
inline void place_gradient(RowBackward& problem, const Tensor& dy, const Tensor& z, int64_t dy_cols,
                           const Tensor& statistics) {
  const Storage storage = storage_of(z);
  problem.dy = dy.data_ptr();
  problem.dy_stride = checked_row_stride(dy, z, dy_cols, "dy");
  FUSED_CHECK(statistics.numel() == statistics_of(problem.norm) * z.size(0) &&
                  storage_of(statistics) == compute_of(storage) && statistics.is_contiguous(),
              "statistics must be those of the forward pass");
  place_statistics(problem, statistics.data_ptr(), z.size(0), storage);
}

// Where the gradient of the rows is written, one tensor of all columns.
inline void write_gradient(RowBackward& problem, const Tensor& dz) {
  problem.dz = problem.dgate = dz.data_ptr();
  problem.dz_stride = dz.size(1);
}

// The gradients of the parameters: sums over the rows, each of chunks × cols partials, of which the
// first row becomes the result; an empty tensor where it is not wanted.
struct RowSums {
  struct Sum {
    Tensor partial;
    bool wanted;
    void* at(int64_t chunk, int64_t cols) const {
      return wanted ? static_cast<char*>(partial.data_ptr()) + chunk * cols * partial.element_size()
                    : nullptr;
    }
  };

  RowSums(int64_t rows, int64_t cols, Storage compute, bool norm_weight_, bool norm_bias_,
          bool bias_)
      : rows(rows),
        cols(cols),
        compute(compute),
        per_chunk(std::max(kRowsPerChunk, (rows + kMaxChunks - 1) / kMaxChunks)),
        chunks(std::max<int64_t>(1, (rows + per_chunk - 1) / per_chunk)),
        norm_weight(make(norm_weight_)),
        norm_bias(make(norm_bias_)),
        bias(make(bias_)) {}

  // Calls body(begin, end, sums, scratch) for each chunk of rows.
  template <class Body>
  void run(const Body& body) const {
    const size_t scratch = sizeof(double) * backward_scratch(cols);
    const int64_t grain = std::max<int64_t>(1, kGrain / (per_chunk * cols));
    parallel_for(0, chunks, grain, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) {
        const ColumnSums sums{norm_weight.at(chunk, cols), norm_bias.at(chunk, cols),
                              bias.at(chunk, cols)};
        body(chunk * per_chunk, std::min(rows, (chunk + 1) * per_chunk), sums,
             thread_buffer(3, scratch));
      }
    });
  }

  // The sum in the dtype of `like`.
  Tensor finish(const Sum& sum, const OptionalTensor& like) const {
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

  Sum make(bool wanted) const {
    Tensor partial = new_tensor({wanted ? chunks * cols : 0}, compute_dtype(compute));
    const size_t bytes = static_cast<size_t>(partial.numel()) * partial.element_size();
    if (bytes) memset(partial.data_ptr(), 0, bytes);  // an empty tensor has no memory
    return {partial, wanted};
  }

  const int64_t rows, cols;
  const Storage compute;
  const int64_t per_chunk, chunks;
  const Sum norm_weight, norm_bias, bias;
};

}  // namespace fused
