// The CPU implementations of the row operators (schemas: fused/ops.py), on libtorch's stable ABI.
//
// This file allocates, chooses the instruction set and splits the rows over threads; the
// arithmetic is in cpu/row_forward.h and cpu/row_backward.h.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/memory.h"
#include "cpu/row.h"

namespace fused {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- instruction set ----

const RowKernels* find_kernels(const std::string& name) {
  if (name == "portable") return &row_kernels_portable();
#if !defined(FUSED_PORTABLE_ONLY)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (name == "avx2" && avx2) return &row_kernels_avx2();
  if (name == "avx512" && avx512) return &row_kernels_avx512();
#endif
  return nullptr;
}

const RowKernels* best_kernels() {
  const char* wanted = std::getenv("FUSED_CPU_ISA");
  if (wanted && *wanted) {
    if (const RowKernels* kernels = find_kernels(wanted)) return kernels;
    std::fprintf(stderr,
                 "fused: FUSED_CPU_ISA=%s is not served by this machine; known: avx512, avx2, "
                 "portable. The best one it has is used.\n",
                 wanted);
  }
  for (const char* name : {"avx512", "avx2"}) {
    if (const RowKernels* kernels = find_kernels(name)) return kernels;
  }
  return &row_kernels_portable();
}

const RowKernels*& active_kernels() {
  static const RowKernels* kernels = best_kernels();
  return kernels;
}

// Whether an output shall bypass the caches: one of half their size cannot stay there along with
// its input. 8192 × 1024 float32 LayerNorm + ReLU: 2.0 against 1.6 ms forward (AMD EPYC 9004, 2
// threads).
bool worth_streaming(const Tensor& out) {
  const size_t row = static_cast<size_t>(out.size(1)) * out.element_size();
  return row % 64 == 0 && reinterpret_cast<uintptr_t>(out.data_ptr()) % 64 == 0 &&
         row * static_cast<size_t>(out.size(0)) >= last_level_cache() / 2;
}

// ---- arguments ----

Storage storage_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Storage::f32;
    case ScalarType::BFloat16:
      return Storage::bf16;
    case ScalarType::Half:
      return Storage::f16;
    case ScalarType::Double:
      return Storage::f64;
    default:
      STD_TORCH_CHECK(false, "fused: the C++ kernels take float32, bfloat16, float16 or float64");
  }
}

int32_t compute_dtype(Storage storage) {
  return storage == Storage::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

float half_to_float(uint16_t half) {
  const uint32_t magnitude = (half & 0x7FFFu) << 13;
  uint32_t bits = magnitude | 0x7F800000u;
  if (magnitude < 0x0F800000u) {
    float scaled;
    memcpy(&scaled, &magnitude, 4);
    scaled *= 0x1p112f;
    memcpy(&bits, &scaled, 4);
  }
  bits |= (half & 0x8000u) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

template <class C>
C element_of(const Tensor& tensor, Storage storage, const void* data, int64_t i) {
  switch (storage) {
    case Storage::f32:
      return static_cast<C>(static_cast<const float*>(data)[i]);
    case Storage::f64:
      return static_cast<C>(static_cast<const double*>(data)[i]);
    case Storage::bf16: {
      const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[i]) << 16;
      float value;
      memcpy(&value, &bits, 4);
      return static_cast<C>(value);
    }
    case Storage::f16:
      return static_cast<C>(half_to_float(static_cast<const uint16_t*>(data)[i]));
  }
  STD_TORCH_CHECK(false, "unreachable dtype ", static_cast<int>(tensor.scalar_type()));
}

// A (cols,) parameter in the compute type: itself, or converted into a buffer of this thread.
const void* column_array(const OptionalTensor& tensor, Storage compute, int slot, int64_t cols) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->numel() == cols && tensor->is_contiguous(),
                  "fused: a per-column parameter must be contiguous with ", cols, " elements, got ",
                  tensor->numel());
  const Storage storage = storage_of(*tensor);
  const void* data = tensor->data_ptr();
  if (storage == compute) return data;
  if (compute == Storage::f64) {
    double* out = static_cast<double*>(thread_buffer(slot, sizeof(double) * cols));
    for (int64_t i = 0; i < cols; ++i) out[i] = element_of<double>(*tensor, storage, data, i);
    return out;
  }
  float* out = static_cast<float*>(thread_buffer(slot, sizeof(float) * cols));
  for (int64_t i = 0; i < cols; ++i) out[i] = element_of<float>(*tensor, storage, data, i);
  return out;
}

int64_t checked_row_stride(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(
      tensor.dim() == 2 && tensor.size(0) == like.size(0) && tensor.size(1) == like.size(1),
      "fused: ", name, " must be (", like.size(0), ", ", like.size(1), ")");
  STD_TORCH_CHECK(tensor.stride(1) == 1 || tensor.size(1) <= 1, "fused: ", name,
                  " must have contiguous rows");
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), "fused: ", name,
                  " must have the dtype of z");
  return tensor.stride(0);
}

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
  const Storage compute = storage_of(z) == Storage::f64 ? Storage::f64 : Storage::f32;
  STD_TORCH_CHECK(z.dim() == 2, "fused: z must be (rows, cols), got ", z.dim(), " dimensions");
  STD_TORCH_CHECK(scalars.norm >= 0 && scalars.norm <= 2, "fused: unknown norm code ",
                  scalars.norm);
  STD_TORCH_CHECK(scalars.activation >= 0 && scalars.activation < kActivations,
                  "fused: unknown activation code ", scalars.activation);
  STD_TORCH_CHECK(scalars.threshold >= 0 && scalars.threshold <= 65536,
                  "fused: the dropout threshold must be in [0, 65536], got ", scalars.threshold);
  problem.cols = z.size(1);
  problem.norm = static_cast<Norm>(scalars.norm);
  problem.eps = scalars.eps;
  problem.alpha = scalars.alpha;
  problem.beta = scalars.beta;
  problem.threshold = static_cast<uint32_t>(scalars.threshold);
  if (problem.threshold) {
    STD_TORCH_CHECK(seed && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long,
                    "fused: dropout needs a seed, an int64 tensor of one element");
    memcpy(&problem.seed, seed->data_ptr(), sizeof(problem.seed));
  }
  problem.z = z.data_ptr();
  problem.z_stride = checked_row_stride(z, z, "z");
  problem.bias = column_array(bias, compute, 0, problem.cols);
  problem.norm_weight = column_array(norm_weight, compute, 1, problem.cols);
  problem.norm_bias = column_array(norm_bias, compute, 2, problem.cols);
}

// ---- forward ----

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kGrain = 16384;

void run_forward(const RowForward& problem, int64_t rows, Storage storage, int64_t activation) {
  const ForwardKernel kernel = active_kernels()->forward[static_cast<int>(storage)][activation];
  const size_t scratch = sizeof(double) * forward_scratch(problem.cols);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, problem.cols));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
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
  int32_t dtype;
  aoti_torch_get_dtype(z.get(), &dtype);
  Tensor y = new_tensor({rows, cols}, dtype);
  Tensor statistics = new_tensor({statistics_of(problem.norm), rows}, compute_dtype(storage));
  if (rows && cols) {
    if (residual) {
      problem.residual = residual->data_ptr();
      problem.residual_stride = checked_row_stride(*residual, z, "residual");
    }
    problem.y = y.data_ptr();
    problem.y_stride = cols;
    place_statistics(problem, statistics.data_ptr(), rows, storage);
    problem.streaming = worth_streaming(y);
    run_forward(problem, rows, storage, activation);
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
  RowForward problem;
  fill_problem(problem, z, bias, norm_weight, norm_bias, seed,
               {norm, eps, activation, alpha, beta, threshold});
  const Storage storage = storage_of(z);
  const int64_t rows = z.size(0);
  if (!rows || !z.size(1)) return;
  if (residual) {
    problem.residual = residual->data_ptr();
    problem.residual_stride = checked_row_stride(*residual, z, "residual");
  }
  problem.y = z.data_ptr();
  problem.y_stride = problem.z_stride;
  place_statistics(problem, thread_buffer(4, 2 * sizeof(double) * rows), rows, storage);
  run_forward(problem, rows, storage, activation);
}

// ---- backward ----

// Which column sums are made (fused/ops.py).
constexpr int64_t kWantNormWeight = 1, kWantNormBias = 2, kWantBias = 4;

// Column sums are taken over chunks of rows, then over the chunks in order. The chunks depend on
// the number of rows alone, so the bits do not change with the number of threads.
constexpr int64_t kRowsPerChunk = 32, kMaxChunks = 64;

template <class C>
void add_chunks(const C* partial, int64_t chunks, int64_t cols, C* out) {
  torch::stable::parallel_for(0, cols, std::max<int64_t>(64, kGrain / chunks),
                              [&](int64_t begin, int64_t end) {
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
  int32_t dtype;
  aoti_torch_get_dtype(like->get(), &dtype);
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
  const Storage compute = storage == Storage::f64 ? Storage::f64 : Storage::f32;
  const int64_t rows = z.size(0), cols = z.size(1);
  int32_t dtype;
  aoti_torch_get_dtype(z.get(), &dtype);
  problem.dy = dy.data_ptr();
  problem.dy_stride = checked_row_stride(dy, z, "dy");
  STD_TORCH_CHECK(statistics.numel() == statistics_of(problem.norm) * rows &&
                      (storage_of(statistics) == compute) && statistics.is_contiguous(),
                  "fused: statistics must be those of the forward pass");
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
    problem.dz = dz.data_ptr();
    problem.streaming = worth_streaming(dz);
    const BackwardKernel kernel = active_kernels()->backward[static_cast<int>(storage)][activation];
    const size_t scratch = sizeof(double) * backward_scratch(cols);
    const int64_t grain = std::max<int64_t>(1, kGrain / (per_chunk * cols));
    torch::stable::parallel_for(0, chunks, grain, [&](int64_t first, int64_t last) {
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

// Called by fused/backend.py through ctypes: neither takes part in a computation.
extern "C" __attribute__((visibility("default"))) const char* fused_cpu_isa() {
  return active_kernels()->name;
}

extern "C" __attribute__((visibility("default"))) int fused_set_cpu_isa(const char* name) {
  const RowKernels* kernels = find_kernels(name);
  if (kernels) active_kernels() = kernels;
  return kernels != nullptr;
}

extern "C" __attribute__((visibility("default"))) void fused_poison_outputs(int on) {
  poison_new_tensors = on != 0;
}

}  // namespace fused

STABLE_TORCH_LIBRARY_IMPL(fused_lnad, CPU, m) {
  m.impl("row_forward", TORCH_BOX(&fused::row_forward));
  m.impl("row_forward_", TORCH_BOX(&fused::row_forward_inplace));
  m.impl("row_backward", TORCH_BOX(&fused::row_backward));
}
