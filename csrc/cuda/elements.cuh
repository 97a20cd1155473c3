// Storage types, what they are computed in, and access to them: 16 bytes at a time, or one by one.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../cpu/codes.h"

namespace fused::cuda {

template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

// A pack is what a thread works on at a time: 16 bytes, but for the gated kernels' in backward.
template <class T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

// What one access of a pack of so many bytes moves.
template <int bytes>
struct WordOf {
  static_assert(bytes % 16 == 0);
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ inline T narrow(Compute<T> x) {
  return x;
}
template <>
__device__ inline __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// N elements from p on, of which the first `count` exist; the others become zero. whole: all exist,
// and p is a multiple of 16 bytes, or of the pack's size where that is less.
template <int N, class C, class T>
__device__ inline void load_pack(const T* p, bool whole, int count, C (&out)[N]) {
  using Word = typename WordOf<N* static_cast<int>(sizeof(T))>::type;
  if (whole) {
    alignas(16) T elements[N];
#pragma unroll
    for (int k = 0; k < static_cast<int>(N * sizeof(T) / sizeof(Word)); ++k) {
      reinterpret_cast<Word*>(elements)[k] = reinterpret_cast<const Word*>(p)[k];
    }
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = widen(elements[k]);
    return;
  }
#pragma unroll
  for (int k = 0; k < N; ++k) out[k] = k < count ? static_cast<C>(widen(p[k])) : C(0);
}

template <int N, class T>
__device__ inline void store_pack(T* p, bool whole, int count, const Compute<T> (&values)[N]) {
  using Word = typename WordOf<N* static_cast<int>(sizeof(T))>::type;
  if (whole) {
    alignas(16) T elements[N];
#pragma unroll
    for (int k = 0; k < N; ++k) elements[k] = narrow<T>(values[k]);
#pragma unroll
    for (int k = 0; k < static_cast<int>(N * sizeof(T) / sizeof(Word)); ++k) {
      reinterpret_cast<Word*>(p)[k] = reinterpret_cast<const Word*>(elements)[k];
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (k < count) p[k] = narrow<T>(values[k]);
  }
}

// Element i of an array whose storage type is known at run time, for the small arrays.
__device__ inline double load_any(const void* data, int64_t storage, int64_t i) {
  switch (static_cast<Storage>(storage)) {
    case Storage::f32:
      return static_cast<const float*>(data)[i];
    case Storage::bf16:
      return widen(static_cast<const __nv_bfloat16*>(data)[i]);
    case Storage::f16:
      return widen(static_cast<const __half*>(data)[i]);
    default:
      return static_cast<const double*>(data)[i];
  }
}

__device__ inline void store_any(void* data, int64_t storage, int64_t i, double x) {
  switch (static_cast<Storage>(storage)) {
    case Storage::f32:
      static_cast<float*>(data)[i] = static_cast<float>(x);
      break;
    case Storage::bf16:
      static_cast<__nv_bfloat16*>(data)[i] = narrow<__nv_bfloat16>(static_cast<float>(x));
      break;
    case Storage::f16:
      static_cast<__half*>(data)[i] = narrow<__half>(static_cast<float>(x));
      break;
    default:
      static_cast<double*>(data)[i] = x;
  }
}

}  // namespace fused::cuda
