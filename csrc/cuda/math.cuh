// The functions that ../activation.h uses, for one float or double, by CUDA's own library: a few
// units in the last place, NaN and infinities right.
#pragma once

#include <cfloat>
#include <cmath>
#include <type_traits>

#include <cuda_runtime.h>

// The name of the code that ../activation.h and ../norm.h are compiled into.
#define FUSED_TARGET cuda

namespace fused::cuda {

template <class V>
__device__ inline V broadcast(double x) {
  return static_cast<V>(x);
}
template <class V>
__device__ inline V select(bool condition, V yes, V no) {
  return condition ? yes : no;
}

__device__ inline float exp(float x) { return ::expf(x); }
__device__ inline double exp(double x) { return ::exp(x); }
__device__ inline float expm1(float x) { return ::expm1f(x); }
__device__ inline double expm1(double x) { return ::expm1(x); }
__device__ inline float tanh(float x) { return ::tanhf(x); }
__device__ inline double tanh(double x) { return ::tanh(x); }
__device__ inline float square_root(float x) { return ::sqrtf(x); }
__device__ inline double square_root(double x) { return ::sqrt(x); }

template <class V>
__device__ inline V reciprocal(V x) {
  return V(1) / x;
}
// The largest finite number for infinity.
__device__ inline float finite(float x) { return x > FLT_MAX ? FLT_MAX : x; }
__device__ inline double finite(double x) { return x > DBL_MAX ? DBL_MAX : x; }

// log(1 + exp(x)) for x ≤ 0.
__device__ inline float log1p_exp(float x) { return ::log1pf(::expf(x)); }
__device__ inline double log1p_exp(double x) { return ::log1p(::exp(x)); }

// Φ, the normal distribution function.
__device__ inline float normal_cdf(float h) { return 0.5f * ::erfcf(h * -0.707106781f); }
__device__ inline double normal_cdf(double h) { return 0.5 * ::erfc(h * -0.70710678118654752440); }

// d/dh h·Φ(h).
template <class V>
__device__ inline V gelu_gradient(V h) {
  return normal_cdf(h) + h * (V(0.39894228040143267794) * exp(V(-0.5) * h * h));
}

}  // namespace fused::cuda
