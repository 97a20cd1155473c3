// Elementary functions for the kernels: a few units in the last place, NaN and infinities right.
//
// The polynomials are relative-error minimax fits (Lawson's iteration, docs/accuracy.md); the bound
// beside each is the fit's, before rounding.
#pragma once

#include <cmath>

#include "vector.h"

namespace fused::FUSED_TARGET {

template <class V>
struct Normal {
  V cdf, pdf;
};

// ---- double: libm ----

inline double exp(double x) { return std::exp(x); }
inline double expm1(double x) { return std::expm1(x); }
inline double tanh(double x) { return std::tanh(x); }
inline double reciprocal(double x) { return 1.0 / x; }
// log(1 + exp(x)) for x ≤ 0.
inline double log1p_exp(double x) { return std::log1p(std::exp(x)); }
inline Normal<double> normal_cdf(double h) {
  constexpr double kSqrtHalf = 0.70710678118654752440, kPdf = 0.39894228040143267794;
  return {0.5 * std::erfc(-h * kSqrtHalf), kPdf * std::exp(-0.5 * h * h)};
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

struct ExpParts {
  f32v n, r;  // x = n·ln 2 + r, |r| ≤ ln 2 / 2
};

inline ExpParts split_exponent(f32v x) {
  // Outside this range exp is 0 or infinity; the clamp keeps n in range and lets NaN through.
  x = x < -104.0f ? f32v{} - 104.0f : x;
  x = x > 89.0f ? f32v{} + 89.0f : x;
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

// (exp(r) − 1 − r) / r² on |r| ≤ ln 2 / 2: 1.5e-8 of it.
constexpr float kExpTail[] = {4.999999955e-1f, 1.666657732e-1f, 4.166685337e-2f, 8.363140376e-3f,
                              1.390128275e-3f};

inline f32v exp(f32v x) {
  const auto [n, r] = split_exponent(x);
  return scale_by_power((r * r) * polynomial(r, kExpTail) + r + 1.0f, n);
}

// exp(x) − 1 for x ≤ 88, as 2ⁿ·(exp(r) − 1) + (2ⁿ − 1): nothing cancels, because n = 0 near 0.
inline f32v expm1(f32v x) {
  const auto [n, r] = split_exponent(x);
  const f32v power = scale_by_power(f32v{} + 1.0f, n);
  const f32v small = (r * r) * polynomial(r, kExpTail) + r;
  return small * power + (power - 1.0f);
}

// 1 / x for x ≥ 1; 0 for infinity.
inline f32v reciprocal(f32v x) {
#if FUSED_AVX512
  // 14 bits, then one Newton step, which would be 0·∞ at infinity; NaN goes through.
  const f32v guess = (f32v)_mm512_rcp14_ps((__m512)x);
  const f32v result = guess + guess * (1.0f - x * guess);
  return x > 3e38f ? f32v{} : result;
#else
  return 1.0f / x;
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

// Φ(h) = 1 − q or q with q = erfc(|h|/√2)/2 = exp(−h²/2)·t·P(t), t = 1 / (1 + 0.23·|h|): the form
// of Abramowitz and Stegun 7.1.26, fitted to 4e-8 of q for |h| ≤ 9. The exponential also gives the
// density, so the derivative of GELU costs one exponential and one division.
inline Normal<f32v> normal_cdf(f32v h) {
  constexpr float kTail[] = {9.197226318e-2f, 8.829533084e-2f,  1.107227887e-1f, -1.431949098e-2f,
                             2.768866852e-1f, -2.582788364e-1f, 2.814558243e-1f, -7.673458435e-2f};
  const f32v t = reciprocal(absolute(h) * 0.23f + 1.0f);
  const f32v e = exp(h * h * -0.5f);
  const f32v q = e * (t * polynomial(t, kTail));
  return {h < 0.0f ? q : 1.0f - q, e * 0.39894228f};
}

}  // namespace fused::FUSED_TARGET
