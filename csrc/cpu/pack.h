// What all kernels share: going over a row in packs of vectors, loads and stores, sums.
#pragma once

#include <algorithm>

#include "math.h"
#include "random.h"

namespace fused::FUSED_TARGET {

// Σ term(i, lanes) over the row, for two terms at once; term gives zero in absent lanes.
template <class V, class F>
FUSED_INLINE inline void accumulate(int64_t cols, V& first, V& second, const F& term) {
  // Independent sums hide the latency of addition, and shorten the chain of roundings; one double
  // at a time needs more of them for that.
  constexpr int kLanes = kLanesOf<V>, kAccumulators = kLanes == 1 ? 16 : 4;
  // One by one and unrolled: as a whole they would be kept, and cleared, in memory.
  V sums[kAccumulators][2];
#pragma GCC unroll 16
  for (int k = 0; k < kAccumulators; ++k) sums[k][0] = sums[k][1] = V{};
  int64_t i = 0;
  for (; i + kAccumulators * kLanes <= cols; i += kAccumulators * kLanes) {
#pragma GCC unroll 16
    for (int k = 0; k < kAccumulators; ++k) {
      term(i + k * kLanes, All<V>{}, sums[k][0], sums[k][1]);
    }
  }
  for_each_vector<V>(i, cols,
                     [&](int64_t j, auto n) FUSED_INLINE { term(j, n, sums[0][0], sums[0][1]); });
#pragma GCC unroll 4
  for (int half = kAccumulators / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int k = 0; k < half; ++k) {
      sums[k][0] += sums[k + half][0];
      sums[k][1] += sums[k + half][1];
    }
  }
  first = sums[0][0];
  second = sums[0][1];
}

// A storage type: how its rows are gone over, read and written.
template <class T>
struct Packs {
  using C = Compute<T>;
  using V = Vector<C>;
  static constexpr int kLanes = kLanesOf<V>;

  // A pack is what a kernel works on at a time: vectors enough to hide each other's latency and to
  // share the branches on what is present.
  static constexpr int kVectors = 4, kPack = kVectors * kLanes;
  static_assert(kRandomBlock % kPack == 0);

  // Calls body(i, vectors, lanes) over a row: whole packs, then single vectors.
  template <class F>
  FUSED_INLINE static void for_each_pack(int64_t cols, const F& body) {
    int64_t i = 0;
    for (; i + kPack <= cols; i += kPack) {
      body(i, std::integral_constant<int, kVectors>{}, All<V>{});
    }
#if FUSED_AVX512
    // A masked vector costs what a whole one does, and one body less is compiled.
    constexpr bool kWhole = kLanes == 1;
#else
    constexpr bool kWhole = true;
#endif
    if constexpr (kWhole) {
      for (; i + kLanes <= cols; i += kLanes) {
        body(i, std::integral_constant<int, 1>{}, All<V>{});
      }
    }
    if constexpr (kLanes > 1) {
      for (; i < cols; i += kLanes) {
        body(i, std::integral_constant<int, 1>{},
             static_cast<int>(std::min<int64_t>(kLanes, cols - i)));
      }
    }
  }

  // Calls body(k, i) for each vector k of a pack, i being its first column.
  template <int kCount, class F>
  FUSED_INLINE static void each(const V (&)[kCount], int64_t start, const F& body) {
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) body(k, start + k * kLanes);
  }

  // Whole vectors of a block in the compute type.
  template <int kCount>
  FUSED_INLINE static void load_pack(V (&values)[kCount], const C* p) {
    each(values, 0, [&](int k, int64_t i) FUSED_INLINE { values[k] = load(p + i, All<V>{}); });
  }
  template <int kCount>
  FUSED_INLINE static void store_pack(C* p, const V (&values)[kCount]) {
    each(values, 0, [&](int k, int64_t i) FUSED_INLINE { store(p + i, values[k], All<V>{}); });
  }

  static C sum_pack(const V (&x)[kVectors]) { return sum_lanes((x[0] + x[1]) + (x[2] + x[3])); }

  // A per-column or per-row array, null where absent.
  static const C* array(const void* p) { return static_cast<const C*>(p); }

  template <class N>
  static void add_to(C* sum, int64_t i, V x, N n) {
    store(sum + i, load(sum + i, n) + x, n);
  }

  template <class N>
  static void store_output(T* p, V x, N n, bool streaming) {
    if (std::is_same_v<N, All<V>> && streaming) {
      store_streaming(p, x);
    } else {
      store(p, x, n);
    }
  }

  // Adds a row to a pack; null: nothing.
  template <int kCount, class N>
  FUSED_INLINE static void add(V (&x)[kCount], const T* row, int64_t start, N n) {
    if (!row) return;
    each(x, start, [&](int k, int64_t i) FUSED_INLINE { x[k] += load(row + i, n); });
  }

  // Asks for what is read a row or more later; the hardware prefetcher stops at page ends. Always
  // inline: GCC 12 takes a function that only prefetches for one without effect and drops its
  // calls.
  FUSED_INLINE static void prefetch(const T* p, int64_t count) {
    constexpr int kPerLine = 64 / sizeof(T);
    for (int64_t i = 0; i < count; i += kPerLine) __builtin_prefetch(p + i, 0, 2);
  }

  static V dropout_scale(uint32_t threshold) {
    return broadcast<V>(threshold < 65536 ? 65536.0 / (65536.0 - threshold) : 0.0);
  }
};

}  // namespace fused::FUSED_TARGET
