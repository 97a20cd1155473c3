// Row kernels: norm, activation, dropout and residual in one pass over a row that stays in cache.
//
// Forward reads z once from memory and writes y: statistics in two passes over the cached row, then
// one pass that normalises, activates, drops and stores. Backward reads z and dy, recomputes the
// normalised row, the mask and the derivative, and writes dz, with the column sums on the way.
#pragma once

#include "math.h"
#include "random.h"
#include "row.h"
// After math.h: its templates need the functions of the vector type declared.
#include "../activation.h"
#include "../norm.h"

namespace fused::FUSED_TARGET {

// Σ term(i, lanes) over the row, for two terms at once; term gives zero in absent lanes.
template <class V, class F>
inline void accumulate(int64_t cols, V& first, V& second, const F& term) {
  // Independent sums hide the latency of addition, and shorten the chain of roundings; one double
  // at a time needs more of them for that.
  constexpr int kLanes = kLanesOf<V>, kAccumulators = kLanes == 1 ? 32 : 4;
  V sums[kAccumulators][2] = {};
  int64_t i = 0;
  for (; i + kAccumulators * kLanes <= cols; i += kAccumulators * kLanes) {
#pragma GCC unroll 4
    for (int k = 0; k < kAccumulators; ++k) {
      term(i + k * kLanes, All<V>{}, sums[k][0], sums[k][1]);
    }
  }
  for_each_vector<V>(i, cols,
                     [&](int64_t j, auto n) FUSED_INLINE { term(j, n, sums[0][0], sums[0][1]); });
  for (int half = kAccumulators / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) {
      sums[k][0] += sums[k + half][0];
      sums[k][1] += sums[k + half][1];
    }
  }
  first = sums[0][0];
  second = sums[0][1];
}

// Asks for one block of the row to come; the hardware prefetcher stops at page ends.
template <class T>
inline void prefetch_block(const T* p) {
  constexpr int kPerLine = 64 / sizeof(T);
  for (int i = 0; i < kRandomBlock; i += kPerLine) __builtin_prefetch(p + i, 0, 2);
}

// What does not depend on the activation, compiled once per storage type.
template <class T>
struct RowBase {
  using C = Compute<T>;
  using V = Vector<C>;
  static constexpr int kLanes = kLanesOf<V>;

  // One element of a per-column or per-row array.
  static const C* at(const void* array, int64_t i) { return static_cast<const C*>(array) + i; }

  static bool must_copy(const RowProblem& problem) { return !std::is_same_v<T, C> || problem.bias; }

  template <class N>
  static V load_input(const T* z, const C* bias, int64_t i, N n) {
    V x = load(z + i, n);
    if (bias) x += load(bias + i, n);
    return x;
  }

  // x̂·weight + bias
  template <class N>
  static V affine(V x, const RowProblem& problem, int64_t i, N n) {
    if (problem.norm_weight) x *= load(at(problem.norm_weight, i), n);
    if (problem.norm_bias) x += load(at(problem.norm_bias, i), n);
    return x;
  }

  template <class N>
  static void add_to(C* sum, int64_t i, V x, N n) {
    store(sum + i, load(sum + i, n) + x, n);
  }

  // The statistics of one row. Where the row is not of the compute type, or a bias is to be added,
  // scratch is filled with what later passes read instead of z.
  //
  // The problem is copied here and in the kernels: a store through a pointer could change what is
  // behind a reference, so the compiler would load it again for every vector.
  [[gnu::noinline]] static RowStatistics<V> statistics(const RowForward& given, const T* z,
                                                       C* scratch, int64_t row) {
    const RowForward problem = given;
    const C* const bias = problem.bias ? at(problem.bias, 0) : nullptr;
    const bool copy = must_copy(problem), centered = problem.norm == Norm::layer;
    const int64_t cols = problem.cols;
    const C inverse = C(1) / static_cast<C>(cols);
    const V share = broadcast<V>(inverse);
    V sum, square;
    // Each term is divided by cols before it is added: values near the largest float do not
    // overflow the mean.
    accumulate<V>(cols, sum, square, [=](int64_t i, auto n, V& s, V& q) FUSED_INLINE {
      const V x = load_input(z, bias, i, n);
      if (copy) store(scratch + i, x, n);
      if (centered) {
        s += x * share;
      } else {
        q += x * x * share;
      }
    });
    C mean = 0, variance = sum_lanes(square);
    if (centered) {
      // Corrected two-pass: Chan, Golub and LeVeque, "Algorithms for computing the sample
      // variance", 1983. The mean of the differences repairs the rounding of the first mean.
      const C first = sum_lanes(sum);
      const V center = broadcast<V>(first);
      accumulate<V>(cols, sum, square, [=](int64_t i, auto n, V& s, V& q) FUSED_INLINE {
        const V x = copy ? load(scratch + i, n) : load_input(z, bias, i, n);
        const V d = first_lanes(x - center, n);
        s += d;
        q += d * d;
      });
      const C shift = sum_lanes(sum) * inverse;
      mean = first + shift;
      variance = sum_lanes(square) * inverse - shift * shift;
      variance = variance < C(0) ? C(0) : variance;
      static_cast<C*>(problem.mean)[row] = mean;
    }
    const C rstd = static_cast<C>(1.0 / std::sqrt(static_cast<double>(variance) + problem.eps));
    static_cast<C*>(problem.rstd)[row] = rstd;
    return {broadcast<V>(mean), broadcast<V>(rstd)};
  }

  // dz of one row from the gradient of its normalised values, and the linear bias's column sum.
  [[gnu::noinline]] static void finish_gradient(const RowBackward& problem, const C* gradient,
                                                const C* normalized, V mean_g, V mean_gx,
                                                const RowStatistics<V>& given_row, T* dz,
                                                C* dbias) {
    const RowStatistics<V> row = given_row;
    const bool streaming = problem.streaming;
    for_each_vector<V>(0, problem.cols, [=](int64_t i, auto n) FUSED_INLINE {
      const V d =
          normalize_gradient(load(gradient + i, n), load(normalized + i, n), mean_g, mean_gx, row);
      if (dbias) add_to(dbias, i, d, n);
      store_output(dz + i, d, n, streaming);
    });
  }

  template <class N>
  static void store_output(T* p, V x, N n, bool streaming) {
    if (std::is_same_v<N, All<V>> && streaming) {
      store_streaming(p, x);
    } else {
      store(p, x, n);
    }
  }

  static V dropout_scale(uint32_t threshold) {
    return broadcast<V>(threshold < 65536 ? 65536.0 / (65536.0 - threshold) : 0.0);
  }
};

template <class T, class Activation>
struct Row : RowBase<T> {
  using Base = RowBase<T>;
  using Base::add_to, Base::affine, Base::at, Base::kLanes, Base::load_input, Base::store_output;
  using typename Base::C;
  using typename Base::V;

  static void forward(const RowForward& given, int64_t begin, int64_t end, void* scratch_) {
    const RowForward problem = given;
    C* scratch = static_cast<C*>(scratch_);
    const int64_t cols = problem.cols;
    const int64_t groups = (cols + kElementsPerCounter - 1) / kElementsPerCounter;
    const C* bias = problem.bias ? at(problem.bias, 0) : nullptr;
    const ActivationParameters<V> parameters{broadcast<V>(problem.alpha),
                                             broadcast<V>(problem.beta)};
    const V scale = Base::dropout_scale(problem.threshold);
    alignas(64) uint16_t random[kRandomBlock];

    for (int64_t row = begin; row < end; ++row) {
      const T* z = static_cast<const T*>(problem.z) + row * problem.z_stride;
      const T* residual =
          problem.residual ? static_cast<const T*>(problem.residual) + row * problem.residual_stride
                           : nullptr;
      T* y = static_cast<T*>(problem.y) + row * problem.y_stride;
      const T* next = row + 1 < end ? z + problem.z_stride : z;
      const bool normed = problem.norm != Norm::none;
      const bool copied = normed && Base::must_copy(problem);
      RowStatistics<V> row_statistics{};
      if (normed) row_statistics = Base::statistics(given, z, scratch, row);

      const auto element = [&](int64_t i, int64_t block, auto n) FUSED_INLINE {
        V h = copied ? load(scratch + i, n) : load_input(z, bias, i, n);
        if (normed) h = normalize(h, row_statistics);
        h = Activation::value(affine(h, problem, i, n), parameters);
        if (problem.threshold) {
          h *= dropout_factor(random + (i - block), problem.threshold, scale);
        }
        if (residual) h += load(residual + i, n);
        store_output(y + i, h, n, problem.streaming);
      };
      for (int64_t block = 0; block < cols; block += kRandomBlock) {
        prefetch_block(next + block);
        if (problem.threshold) {
          random_block(problem.seed,
                       static_cast<uint64_t>(row) * groups + block / kElementsPerCounter, random);
        }
        if (block + kRandomBlock <= cols) {
          for (int j = 0; j < kRandomBlock; j += kLanes) element(block + j, block, All<V>{});
        } else {
          for_each_vector<V>(block, cols,
                             [&](int64_t i, auto n) FUSED_INLINE { element(i, block, n); });
        }
      }
    }
    if (problem.streaming) fence_streaming();
  }

  static void backward(const RowBackward& given, int64_t begin, int64_t end, const ColumnSums& sums,
                       void* scratch_) {
    const RowBackward problem = given;
    const int64_t cols = problem.cols;
    C* gradient = static_cast<C*>(scratch_);
    C* normalized = gradient + scratch_elements(cols) / 2;
    C* const dweight = static_cast<C*>(sums.norm_weight);
    C* const dnorm_bias = static_cast<C*>(sums.norm_bias);
    C* const dbias = static_cast<C*>(sums.bias);
    const int64_t groups = (cols + kElementsPerCounter - 1) / kElementsPerCounter;
    const C* bias = problem.bias ? at(problem.bias, 0) : nullptr;
    const ActivationParameters<V> parameters{broadcast<V>(problem.alpha),
                                             broadcast<V>(problem.beta)};
    const V scale = Base::dropout_scale(problem.threshold);
    const bool normed = problem.norm != Norm::none, centered = problem.norm == Norm::layer;
    const C inverse = C(1) / static_cast<C>(cols);
    alignas(64) uint16_t random[kRandomBlock];

    for (int64_t row = begin; row < end; ++row) {
      const T* z = static_cast<const T*>(problem.z) + row * problem.z_stride;
      const T* dy = static_cast<const T*>(problem.dy) + row * problem.dy_stride;
      T* dz = static_cast<T*>(problem.dz) + row * cols;
      const T* next_z = row + 1 < end ? z + problem.z_stride : z;
      const T* next_dy = row + 1 < end ? dy + problem.dy_stride : dy;
      const RowStatistics<V> row_statistics{broadcast<V>(centered ? *at(problem.mean, row) : C(0)),
                                            broadcast<V>(normed ? *at(problem.rstd, row) : C(1))};
      V sum_g{}, sum_gx{};

      const auto element = [&](int64_t i, int64_t block, auto n) FUSED_INLINE {
        V x = load_input(z, bias, i, n);
        if (normed) x = normalize(x, row_statistics);
        V g = load(dy + i, n);
        if (problem.threshold) {
          g *= dropout_factor(random + (i - block), problem.threshold, scale);
        }
        g *= Activation::gradient(affine(x, problem, i, n), parameters);
        if (!normed) {
          if (dbias) add_to(dbias, i, g, n);
          store_output(dz + i, g, n, problem.streaming);
          return;
        }
        if (dweight) add_to(dweight, i, g * x, n);
        if (dnorm_bias) add_to(dnorm_bias, i, g, n);
        if (problem.norm_weight) g *= load(at(problem.norm_weight, i), n);
        g = first_lanes(g, n);
        sum_g += g;
        sum_gx += g * x;
        store(gradient + i, g, n);
        store(normalized + i, x, n);
      };
      for (int64_t block = 0; block < cols; block += kRandomBlock) {
        prefetch_block(next_z + block);
        prefetch_block(next_dy + block);
        if (problem.threshold) {
          random_block(problem.seed,
                       static_cast<uint64_t>(row) * groups + block / kElementsPerCounter, random);
        }
        if (block + kRandomBlock <= cols) {
          for (int j = 0; j < kRandomBlock; j += kLanes) element(block + j, block, All<V>{});
        } else {
          for_each_vector<V>(block, cols,
                             [&](int64_t i, auto n) FUSED_INLINE { element(i, block, n); });
        }
      }
      if (!normed) continue;
      const V mean_g = broadcast<V>(centered ? sum_lanes(sum_g) * inverse : C(0));
      const V mean_gx = broadcast<V>(sum_lanes(sum_gx) * inverse);
      Base::finish_gradient(given, gradient, normalized, mean_g, mean_gx, row_statistics, dz,
                            dbias);
    }
    if (problem.streaming) fence_streaming();
  }
};

template <class T>
inline void fill_storage(RowKernels& kernels, Storage storage) {
  int code = 0;
#define FUSED_FILL(Activation)                                                    \
  kernels.forward[static_cast<int>(storage)][code] = Row<T, Activation>::forward; \
  kernels.backward[static_cast<int>(storage)][code++] = Row<T, Activation>::backward;
  FUSED_FOR_EACH_ACTIVATION(FUSED_FILL)
#undef FUSED_FILL
}

inline RowKernels make_row_kernels(const char* name) {
  RowKernels kernels{};
  kernels.name = name;
  fill_storage<float>(kernels, Storage::f32);
  fill_storage<bfloat16>(kernels, Storage::bf16);
  fill_storage<float16>(kernels, Storage::f16);
  fill_storage<double>(kernels, Storage::f64);
  return kernels;
}

}  // namespace fused::FUSED_TARGET
