// The backward row kernel. It reads z and dy, recomputes the normalised row, the mask and the
// derivative, and writes dz, with the column sums of the parameters' gradients on the way.
#pragma once

#include "epilogue.h"
#include "row_statistics.h"

namespace fused::FUSED_TARGET {

// The second pass over a row, which does not depend on the activation.
template <class T>
struct RowBackwardBase : RowBase<T> {
  using Base = RowBase<T>;
  using Base::each, Base::add_to, Base::store_output;
  using typename Base::C;
  using typename Base::V;

  // dz of one row from the gradient of its normalised values and what is added to it, and the
  // linear bias's column sum.
  // The input is a copy: what a reference points to would be in memory, where each store may change
  // it.
  [[gnu::noinline]] static void finish(const RowInput<T> input, int64_t cols, T* const dz,
                                       const C* const gradient, V mean_g, V mean_gx,
                                       const T* const added, C* const dbias, bool streaming) {
    Base::for_each_pack(cols, [=](int64_t start, auto count, auto n) FUSED_INLINE {
      V x[decltype(count)::value];
      input.load(x, start, n);
      each(x, start, [&](int k, int64_t i) FUSED_INLINE {
        V d = normalize_gradient(load(gradient + i, n), x[k], mean_g, mean_gx, input.statistics);
        if (added) d += load(added + i, n);
        if (dbias) add_to(dbias, i, d, n);
        store_output(dz + i, d, n, streaming);
      });
    });
  }
};

template <class T, Through kThrough>
struct RowBackwardKernel : RowBackwardBase<T> {
  using Base = RowBackwardBase<T>;
  using Base::each, Base::add_to, Base::array, Base::store_output;
  using typename Base::C;
  using typename Base::V;

  static void run(const RowBackward& problem, int64_t begin, int64_t end, const ColumnSums& sums,
                  void* scratch) {
    const int64_t cols = problem.cols, z_stride = problem.z_stride, dy_stride = problem.dy_stride;
    const int64_t gate_stride = problem.gate_stride, dz_stride = problem.dz_stride;
    const int64_t dy_cols = kThrough == Through::gate ? cols / 2 : cols;
    const bool normed = problem.norm != Norm::none, centered = problem.norm == Norm::layer;
    const bool streaming = problem.stages.streaming;
    const C *const bias = array(problem.bias), *const weight = array(problem.norm_weight),
                   *const shift = array(problem.norm_bias);
    C *const gradient = static_cast<C*>(scratch),
             *const dweight = static_cast<C*>(sums.norm_weight),
             *const dshift = static_cast<C*>(sums.norm_bias),
             *const dbias = static_cast<C*>(sums.bias);
    const C inverse = C(1) / static_cast<C>(cols);
    Epilogue<T, kThrough> epilogue(problem.stages);

    for (int64_t row = begin; row < end; ++row) {
      const T* const z = static_cast<const T*>(problem.z) + row * z_stride;
      const T* const dy = static_cast<const T*>(problem.dy) + row * dy_stride;
      const T* const gate = static_cast<const T*>(problem.gate) + row * gate_stride;
      const int64_t ahead = row + 1 < end;
      T* const dz = static_cast<T*>(problem.dz) + row * dz_stride;
      T* const dgate = static_cast<T*>(problem.dgate) + row * dz_stride;
      T* const dshortcut =
          problem.dshortcut ? static_cast<T*>(problem.dshortcut) + row * cols : nullptr;
      const RowInput<T> input{{},
                              z,
                              z + ahead * z_stride,
                              nullptr,
                              bias,
                              weight,
                              shift,
                              normed,
                              Base::statistics_of(problem, row),
                              gate,
                              gate + ahead * gate_stride,
                              Base::shortcut_of(problem, row)};
      V sum_g{}, sum_gx{};
      const auto done = [&](auto& g, auto& x, int64_t start, auto n) FUSED_INLINE {
        if (!normed) {
          T* const out = kThrough == Through::gate && start >= dy_cols ? dgate : dz;
          each(g, start, [&](int k, int64_t i) FUSED_INLINE {
            if (dbias) add_to(dbias, i, g[k], n);
            store_output(out + i, g[k], n, streaming);
          });
          return;
        }
        if (dshortcut) {
          each(g, start, [&](int k, int64_t i) FUSED_INLINE { store(dshortcut + i, g[k], n); });
        }
        if (dweight) {
          each(g, start,
               [&](int k, int64_t i) FUSED_INLINE { add_to(dweight, i, g[k] * x[k], n); });
        }
        if (dshift) {
          each(g, start, [&](int k, int64_t i) FUSED_INLINE { add_to(dshift, i, g[k], n); });
        }
        if (weight) {
          each(g, start, [&](int k, int64_t i) FUSED_INLINE { g[k] *= load(weight + i, n); });
        }
        // By packs: the addition of one waits for that of the one before.
        V of_pack, of_products;
        each(g, start, [&](int k, int64_t i) FUSED_INLINE {
          g[k] = first_lanes(g[k], n);
          of_pack = k ? of_pack + g[k] : g[k];
          of_products = k ? of_products + g[k] * x[k] : g[k] * x[k];
          store(gradient + i, g[k], n);
        });
        sum_g += of_pack;
        sum_gx += of_products;
      };
      epilogue.gradient(
          0, dy_cols, input,
          {dy, dy + ahead * dy_stride, static_cast<uint64_t>(row * counters_of(dy_cols)),
           normed || dbias || streaming ? nullptr : dz, dgate},
          done);
      if (!normed) continue;
      const V mean_g = broadcast<V>(centered ? sum_lanes(sum_g) * inverse : C(0));
      const V mean_gx = broadcast<V>(sum_lanes(sum_gx) * inverse);
      const T* const added = static_cast<const T*>(problem.added);
      Base::finish(input, cols, dz, gradient, mean_g, mean_gx,
                   added ? added + row * problem.added_stride : nullptr, dbias, streaming);
    }
    if (streaming) fence_streaming();
  }
};

}  // namespace fused::FUSED_TARGET
