// What the channel kernels share: coefficients, and what h is made of.
#pragma once

#include "channel.h"
#include "epilogue.h"

namespace fused::FUSED_TARGET {

// A coefficient along a row.
template <class T, By kBy>
struct Coefficient {
  using C = Compute<T>;
  using V = Vector<C>;

  Coefficient(const void* given, int64_t index) : pointer(static_cast<const C*>(given)) {
    if constexpr (kBy == By::row) value = broadcast<V>(given ? pointer[index] : C(0));
  }
  template <class N>
  V at(int64_t i, N n) const {
    if constexpr (kBy == By::row) return value;
    return load(pointer + i, n);
  }
  const C* pointer;
  V value;
};

// h = d·scale + shift + shortcut of a row, with d = z − mean: the Input of epilogue.h.
template <class T, By kBy>
struct ChannelInput : Packs<T> {
  using Packs<T>::each;
  using typename Packs<T>::V;

  // Memory is read in order, so what comes next is this far ahead; the hardware prefetcher stops at
  // page ends.
  static constexpr int64_t kAhead = 4096 / sizeof(T);

  ChannelInput(const ChannelRows& rows, int64_t row)
      : ChannelInput(rows, row, rows.coefficients, row * rows.coefficient_step) {}

  template <int kCount, class N>
  FUSED_INLINE void load(V (&d)[kCount], int64_t start, N n) const {
    each(d, start, [&](int k, int64_t i) FUSED_INLINE {
      d[k] = FUSED_TARGET::load(z + i, n) - mean.at(i, n);
    });
  }
  template <int kCount, class N>
  FUSED_INLINE void affine(V (&d)[kCount], int64_t start, N n) const {
    each(d, start,
         [&](int k, int64_t i) FUSED_INLINE { d[k] = d[k] * scale.at(i, n) + shift.at(i, n); });
    Packs<T>::add(d, shortcut, start, n);
  }
  template <int kCount, class N>
  FUSED_INLINE void rescale(V (&y)[kCount], int64_t start, N n) const {
    if (!rescales()) return;
    each(y, start, [&](int k, int64_t i) FUSED_INLINE { y[k] *= factor.at(i, n); });
  }

  bool rescales() const { return factor.pointer; }
  static constexpr bool gives_x() { return true; }
  static const T* plain() { return nullptr; }

  // Whether the mask leaves the row out; if so, its part of what is written is zero.
  static bool left_out(const ChannelRows& rows, int64_t row) {
    if (!rows.mask || rows.mask[row]) return false;
    for (void* const written : {rows.out, rows.dshortcut}) {
      if (!written) continue;
      T* const first = static_cast<T*>(written) + row * rows.stride;
      memset(static_cast<void*>(first), 0, sizeof(T) * static_cast<size_t>(rows.cols));
    }
    return true;
  }

  const T *const z, *const ahead, *const shortcut;
  const Coefficient<T, kBy> mean, scale, shift, factor;

 private:
  ChannelInput(const ChannelRows& rows, int64_t row, const Coefficients& c, int64_t own)
      : z(static_cast<const T*>(rows.z) + row * rows.stride),
        ahead(z + kAhead),
        shortcut(rows.shortcut ? static_cast<const T*>(rows.shortcut) + row * rows.stride
                               : nullptr),
        mean(c.mean, own),
        scale(c.scale, own),
        shift(c.shift, own),
        factor(c.factor, own) {}
};

// Where a row's gradient is.
template <class T, By kBy>
inline GradientRow<T> gradient_row(const ChannelRows& rows, int64_t row) {
  const T* const dy = static_cast<const T*>(rows.dy) + row * rows.stride;
  return {dy, dy + ChannelInput<T, kBy>::kAhead,
          rows.counter + static_cast<uint64_t>(row) * rows.row_counters, nullptr};
}

}  // namespace fused::FUSED_TARGET
