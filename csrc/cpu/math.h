// Elementary functions for the kernels: a few units in the last place, NaN and infinities right.
//
// The polynomials are minimax fits; the bound beside each is the fit's, before rounding to float.
// tests/fits.py makes those of exp, normal_cdf and gelu_gradient.
#pragma once

#include <cmath>
#include <limits>

#include "vector.h"

namespace fused::FUSED_TARGET {

// ---- double: libm ----

inline double exp(double x) { return std::exp(x); }
inline double expm1(double x) { return std::expm1(x); }
inline double tanh(double x) { return std::tanh(x); }
inline double reciprocal(double x) { return 1.0 / x; }
// The largest finite number for infinity.
inline double finite(double x) { return std::isinf(x) ? std::numeric_limits<double>::max() : x; }
// log(1 + exp(x)) for x ≤ 0.
inline double log1p_exp(double x) { return std::log1p(std::exp(x)); }
// Φ, the normal distribution function, and d/dh h·Φ(h).
inline double normal_cdf(double h) { return 0.5 * std::erfc(-h * 0.70710678118654752440); }
inline double gelu_gradient(double h) {
  return normal_cdf(h) + h * 0.39894228040143267794 * std::exp(-0.5 * h * h);
}

// ---- vectors of float ----

template <int kDegree>
inline f32v polynomial(f32v x, const float (&coefficients)[kDegree]) {
  f32v p = f32v{} + coefficients[kDegree - 1];
#pragma GCC unroll 16
  for (int k = kDegree - 2; k >= 0; --k) p = p * x + coefficients[k];
  return p;
}

// x·2ⁿ for |n| ≤ 252, by two exact factors, so that overflow and denormals come out right.
inline f32v scale_by_power(f32v x, f32v n) {
#if FUSED_AVX512
  return (f32v)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
  const i32v whole = __builtin_convertvector(n, i32v);
  const i32v half = whole >> 1;
  const f32v first = as_float((u32v)((half + 127) << 23));
  const f32v second = as_float((u32v)((whole - half + 127) << 23));
  return x * first * second;
#endif
}

// x, but no less than low or no more than high; NaN goes through.
inline f32v at_least(f32v x, float low) {
#if FUSED_AVX512
  return (f32v)_mm512_max_ps(_mm512_set1_ps(low), (__m512)x);
#elif FUSED_AVX2
  return (f32v)_mm256_max_ps(_mm256_set1_ps(low), (__m256)x);
#else
  return x < low ? f32v{} + low : x;
#endif
}
inline f32v at_most(f32v x, float high) {
#if FUSED_AVX512
  return (f32v)_mm512_min_ps(_mm512_set1_ps(high), (__m512)x);
#elif FUSED_AVX2
  return (f32v)_mm256_min_ps(_mm256_set1_ps(high), (__m256)x);
#else
  return x > high ? f32v{} + high : x;
#endif
}

inline f32v finite(f32v x) { return at_most(x, std::numeric_limits<float>::max()); }

struct ExpParts {
  f32v n, r;  // x = n·ln 2 + r, |r| ≤ ln 2 / 2
};

inline ExpParts split_exponent(f32v x) {
  // Outside this range exp is 0 or infinity; the clamp keeps n in range.
  x = at_most(at_least(x, -104.0f), 89.0f);
#if FUSED_AVX512
  const f32v n = (f32v)_mm512_roundscale_ps((__m512)(x * 1.44269504f),
                                            _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const f32v shifter = f32v{} + 0x1.8p23f;  // adding it rounds to an integer
  f32v shifted = x * 1.44269504f + shifter;
  asm("" : "+x"(shifted));  // keeps the compiler from cancelling the shifter
  const f32v n = shifted - shifter;
#endif
  const f32v r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  return {n, r};
}

// exp(r) = 1 + r + r²·tail(r) on |r| ≤ ln 2 / 2: 3e-9 of it.
constexpr float kExpTail[] = {4.999999345e-1f, 1.666652069e-1f, 4.166838737e-2f, 8.368709988e-3f,
                              1.381461330e-3f};

inline f32v exp(f32v x) {
  const auto [n, r] = split_exponent(x);
  return scale_by_power((polynomial(r, kExpTail) * r + 1.0f) * r + 1.0f, n);
}

// exp(x) − 1 for x ≤ 88, as 2ⁿ·(exp(r) − 1) + (2ⁿ − 1): nothing cancels, because n = 0 near 0.
inline f32v expm1(f32v x) {
  const auto [n, r] = split_exponent(x);
  const f32v power = scale_by_power(f32v{} + 1.0f, n);
  const f32v small = (r * r) * polynomial(r, kExpTail) + r;
  return small * power + (power - 1.0f);
}

// 1 / x for 1 ≤ x: 0 beyond 3e38 and for infinity, and NaN goes through.
inline f32v reciprocal(f32v x) {
#if FUSED_AVX512
  // 14 bits, then one Newton step, which would be 0·∞ at infinity.
  const __m512 guess = _mm512_rcp14_ps((__m512)x);
  const __m512 error = _mm512_fnmadd_ps((__m512)x, guess, _mm512_set1_ps(1.0f));
  const __mmask16 finite = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(3e38f), _CMP_NGT_UQ);
  return (f32v)_mm512_maskz_fmadd_ps(finite, guess, error, guess);
#else
  return 1.0f / x;
#endif
}

// p / q for q of ordinary size.
inline f32v quotient(f32v p, f32v q) {
#if FUSED_AVX512
  const f32v guess = (f32v)_mm512_rcp14_ps((__m512)q);
  return p * (guess + guess * (1.0f - q * guess));
#else
  return p / q;
#endif
}

inline f32v absolute(f32v x) { return as_float(as_bits(x) & 0x7FFFFFFFu); }
inline f32v copy_sign(f32v magnitude, f32v sign) {
  return as_float(as_bits(magnitude) | (as_bits(sign) & 0x80000000u));
}

// Below 0.625 an odd polynomial (1.7e-8), beyond it 1 − 2 / (exp(2|x|) + 1).
inline f32v tanh(f32v x) {
  constexpr float kTail[] = {-3.333332896e-1f, 1.333277053e-1f, -5.385099392e-2f, 2.099749453e-2f,
                             -6.097096520e-3f};
  const f32v a = absolute(x), square = x * x;
  const f32v near = x + x * square * polynomial(square, kTail);
  const f32v far = 1.0f - 2.0f * reciprocal(exp(a + a) + 1.0f);
  return a < 0.625f ? near : copy_sign(far, x);
}

// log(1 + exp(x)) for x ≤ 0: 2·artanh(s), s = e / (2 + e), by an odd polynomial (1.5e-8).
inline f32v log1p_exp(f32v x) {
  constexpr float kTail[] = {3.333331996e-1f, 2.000381337e-1f, 1.411751236e-1f, 1.343055297e-1f};
  const f32v e = exp(x);
  const f32v s = e / (e + 2.0f);
  const f32v square = s * s;
  const f32v half = s + s * square * polynomial(square, kTail);
  return half + half;
}

// Φ(h) = 1/2 + h·P(h²) / Q(h²), so that h·Φ(h) is right to 9e-9 for |h| ≤ 5.2; exactly 0 and 1
// beyond, where it is that to float precision.
inline f32v normal_cdf(f32v h) {
  constexpr float kP[] = {3.989421546e-1f, 3.335725231e-2f, 4.657556849e-3f,
                          1.651521371e-4f, 6.462559010e-6f, 2.403903728e-8f};
  constexpr float kQ[] = {
      1.0f, 2.502795437e-1f, 2.839000421e-2f, 1.863399443e-3f, 7.316634432e-5f, 1.242983770e-6f};
  const f32v s = at_most(h * h, 27.04f);
  const f32v half = quotient(h * polynomial(s, kP), polynomial(s, kQ));
  return at_most(at_least(half, -0.5f), 0.5f) + 0.5f;
}

// d/dh h·Φ(h) = 1/2 + h·P(h²) / Q(h²): 4e-9 for |h| ≤ 6; exactly 0 and 1 beyond, where it is that
// to 4e-8.
inline f32v gelu_gradient(f32v h) {
  constexpr float kP[] = {7.978845478e-1f, -2.267206332e-2f, 1.386933090e-2f, 1.971452166e-4f,
                          3.409963949e-5f, 9.065252845e-7f,  1.686234444e-8f};
  constexpr float kQ[] = {1.0f,
                          3.049178617e-1f,
                          4.402276191e-2f,
                          3.956054545e-3f,
                          2.438766651e-4f,
                          1.024119328e-5f,
                          3.338194110e-7f,
                          1.304927575e-9f};
  const f32v square = h * h, s = at_most(square, 36.0f);
  const f32v near = quotient(h * polynomial(s, kP), polynomial(s, kQ));
  const f32v half = square >= 36.0f ? copy_sign(f32v{} + 0.5f, h) : near;
  return half + (h * 0.0f + 0.5f);  // 0·h is NaN for infinity, as torch's h·φ(h) is
}

}  // namespace fused::FUSED_TARGET
