// What the channel kernels share: coefficients, activations by comparison or by stage, and the
// gradient of h along a row.
#pragma once

#include "channel.h"
#include "pack.h"
// After pack.h: its templates need the functions of the vector type declared.
#include "../activation.h"

namespace fused::FUSED_TARGET {

// relu for alpha = 0, no activation for alpha = NaN, with which every comparison is false.
struct Floor {
  template <class V>
  static V value(V h, const ActivationParameters<V>& parameters) {
    return select(h < parameters.alpha, parameters.alpha, h);
  }
  template <class V>
  static V gradient(V g, V h, const ActivationParameters<V>& parameters) {
    return select(h <= parameters.alpha, broadcast<V>(0.0), g);
  }
};

// Elements of a row that are staged together; their copies stay in the first-level cache.
constexpr int64_t kSegment = 256;
static_assert(kSegment % kRandomBlock == 0);

template <class T, By kBy, Through kThrough>
struct ChannelBase : Packs<T> {
  using Base = Packs<T>;
  using Base::kLanes, Base::array;
  using typename Base::C;
  using typename Base::V;

  // Memory is read in order, so what comes next is this far ahead; the hardware prefetcher stops at
  // page ends.
  static constexpr int64_t kAhead = 4096 / sizeof(T);

  struct Coefficient {
    Coefficient(const void* given, int64_t index) : pointer(array(given)) {
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

  // Calls body(k, i) for the vectors of a pack.
  template <int kCount, class F>
  FUSED_INLINE static void each(int64_t start, const F& body) {
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) body(k, start + k * kLanes);
  }

  // What a call keeps in registers or on the stack over all its rows.
  struct Call {
    Call(const ChannelStages& stages, const ChannelRows& rows)
        : parameters{broadcast<V>(stages.alpha), broadcast<V>(stages.beta)},
          scale(Base::dropout_scale(stages.threshold)),
          threshold(stages.threshold),
          keys(stages.seed),
          has_factor(rows.coefficients.factor != nullptr) {}

    // Multiplies a pack by dropout's factors; start is its column.
    template <int kCount, class N>
    FUSED_INLINE void drop(V (&values)[kCount], int64_t start, N n, uint64_t counter,
                           const Coefficient& factor) {
      if (threshold) {
        const int first = static_cast<int>(start % kRandomBlock);
        if (first == 0) keep.draw(keys, counter + start / kElementsPerCounter, threshold);
        each<kCount>(start, [&](int k, int64_t) FUSED_INLINE {
          values[k] *= keep.factor(first + k * kLanes, scale);
        });
      }
      if (has_factor) {
        each<kCount>(start, [&](int k, int64_t i) FUSED_INLINE { values[k] *= factor.at(i, n); });
      }
    }

    const ActivationParameters<V> parameters;
    const V scale;
    const uint32_t threshold;
    const PhiloxKeys keys;
    const bool has_factor;
    KeepBlock keep;
  };

  // Calls finish(start, n, g, d) for the packs of columns [begin, end) of a row, with g the
  // gradient of h and d = z − mean; begin is a multiple of kRandomBlock.
  template <class F>
  FUSED_INLINE static void each_gradient(const ChannelStages& stages, Call& call,
                                         const ChannelRows& rows, int64_t row, int64_t begin,
                                         int64_t end, const F& finish) {
    const T* const z = static_cast<const T*>(rows.z) + row * rows.stride;
    const T* const dy = static_cast<const T*>(rows.dy) + row * rows.stride;
    const Coefficients& c = rows.coefficients;
    const int64_t own = row * rows.coefficient_step;
    const Coefficient mean(c.mean, own), scale(c.scale, own), shift(c.shift, own),
        factor(c.factor, own);
    const uint64_t counter = rows.counter + static_cast<uint64_t>(row) * rows.row_counters;
    if constexpr (kThrough == Through::comparison) {
      Base::for_each_pack(end - begin, [&](int64_t from, auto count, auto n) FUSED_INLINE {
        constexpr int kCount = decltype(count)::value;
        const int64_t start = begin + from;
        Base::prefetch_pack(z + start + kAhead);
        Base::prefetch_pack(dy + start + kAhead);
        V d[kCount], g[kCount];
        each<kCount>(start, [&](int k, int64_t i) FUSED_INLINE {
          d[k] = load(z + i, n) - mean.at(i, n);
          const V h = d[k] * scale.at(i, n) + shift.at(i, n);
          g[k] = Floor::gradient(load(dy + i, n), h, call.parameters);
        });
        call.drop(g, start, n, counter, factor);
        finish(start, n, g, d);
      });
    } else {
      alignas(64) C h[kSegment], gradient[kSegment];
      for (int64_t first = begin; first < end; first += kSegment) {
        const int64_t size = std::min(kSegment, end - first);
        Base::for_each_pack(size, [&](int64_t from, auto count, auto n) FUSED_INLINE {
          Base::prefetch_pack(z + first + from + kAhead);
          Base::prefetch_pack(dy + first + from + kAhead);
          each<decltype(count)::value>(from, [&](int, int64_t j) FUSED_INLINE {
            const int64_t i = first + j;
            store(h + j, (load(z + i, n) - mean.at(i, n)) * scale.at(i, n) + shift.at(i, n), n);
            store(gradient + j, load(dy + i, n), n);
          });
        });
        stages.gradient(gradient, h, size, stages.alpha, stages.beta);
        Base::for_each_pack(size, [&](int64_t from, auto count, auto n) FUSED_INLINE {
          constexpr int kCount = decltype(count)::value;
          V d[kCount], g[kCount];
          each<kCount>(from, [&](int k, int64_t j) FUSED_INLINE {
            d[k] = load(z + first + j, n) - mean.at(first + j, n);
            g[k] = load(gradient + j, n);
          });
          call.drop(g, first + from, n, counter, factor);
          finish(first + from, n, g, d);
        });
      }
    }
  }

  // Whether the mask leaves the row out; if so, its part of `out` is zero.
  static bool left_out(const ChannelRows& rows, int64_t row) {
    if (!rows.mask || rows.mask[row]) return false;
    if (rows.out) {
      T* const out = static_cast<T*>(rows.out) + row * rows.stride;
      memset(static_cast<void*>(out), 0, sizeof(T) * static_cast<size_t>(rows.cols));
    }
    return true;
  }
};

}  // namespace fused::FUSED_TARGET
