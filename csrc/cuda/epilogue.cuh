// What follows the norm, for the elements that one thread holds: activation and dropout.
#pragma once

#include <cstdint>

#include "math.cuh"
// After math.cuh: their templates need its functions declared.
#include "../activation.h"
#include "../norm.h"
#include "../philox.h"
#include "elements.cuh"

namespace fused::cuda {

// The codes of fused/spec.py.
enum ActivationCode {
#define FUSED_CODE(A) k##A,
  FUSED_FOR_EACH_ACTIVATION(FUSED_CODE)
#undef FUSED_CODE
};

// h becomes the activation's value.
template <class C, int N>
__device__ inline void activate(int64_t code, const ActivationParameters<C>& parameters,
                                C (&h)[N]) {
  switch (static_cast<int>(code)) {
#define FUSED_CASE(A)                                                                \
  case k##A:                                                                         \
    _Pragma("unroll") for (int k = 0; k < N; ++k) h[k] = A::value(h[k], parameters); \
    break;
    FUSED_FOR_EACH_ACTIVATION(FUSED_CASE)
#undef FUSED_CASE
  }
}

// g, the gradient of the activation's value at h, becomes that of h.
template <class C, int N>
__device__ inline void activate_gradient(int64_t code, const ActivationParameters<C>& parameters,
                                         const C (&h)[N], C (&g)[N]) {
  switch (static_cast<int>(code)) {
#define FUSED_CASE(A)                                                                             \
  case k##A:                                                                                      \
    _Pragma("unroll") for (int k = 0; k < N; ++k) { g[k] = A::gradient(g[k], h[k], parameters); } \
    break;
    FUSED_FOR_EACH_ACTIVATION(FUSED_CASE)
#undef FUSED_CASE
  }
}

struct RandomWords {
  uint32_t at[4];
  // The 16-bit number of the counter's element e. Not indexed, which would put the words in memory.
  __device__ uint32_t number(int e) const {
    const uint32_t first = e & 2 ? at[1] : at[0], second = e & 2 ? at[3] : at[2];
    return ((e & 4 ? second : first) >> (16 * (e & 1))) & 0xFFFFu;
  }
};

__device__ inline RandomWords philox(uint64_t seed, uint64_t counter) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = 0, c3 = 0;
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c0;
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// Dropout of a mask that is laid over rows of `cols` elements.
template <class C>
struct Dropout {
  uint64_t seed = 0, counters = 0;  // counters: of a row
  uint32_t threshold;
  C scale;

  __device__ Dropout(const void* seed_, int64_t threshold_, int64_t cols)
      : threshold(static_cast<uint32_t>(threshold_)) {
    if (!threshold) return;
    seed = *static_cast<const uint64_t*>(seed_);
    counters = static_cast<uint64_t>(ceil_div(cols, kElementsPerCounter));
    scale = threshold < 65536 ? C(65536) / static_cast<C>(65536 - threshold) : C(0);
  }

  __device__ RandomWords words(int64_t row, int64_t col) const {
    return philox(seed, static_cast<uint64_t>(row) * counters +
                            static_cast<uint64_t>(col) / kElementsPerCounter);
  }
  __device__ C factor(const RandomWords& words, int e) const {
    return words.number(e) >= threshold ? scale : C(0);
  }

  // Multiplies the elements from col on, a multiple of N, by the scale or by zero.
  template <int N>
  __device__ void apply(int64_t row, int64_t col, C (&values)[N]) const {
    static_assert(kElementsPerCounter % N == 0);
    const RandomWords drawn = words(row, col);
    const int first = N == kElementsPerCounter ? 0 : static_cast<int>(col % kElementsPerCounter);
#pragma unroll
    for (int k = 0; k < N; ++k) values[k] *= factor(drawn, first + k);
  }
};

}  // namespace fused::cuda
