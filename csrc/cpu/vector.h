// Vectors of floats in the width of the instruction set that this file is compiled for.
//
// The kernels are one source, compiled once per instruction set (row_avx512.cpp, row_avx2.cpp,
// row_portable.cpp) in a namespace of its own, so that the linker never mixes their code.
// GCC's vector extensions carry the arithmetic; intrinsics appear only where the compiler does not
// find the instruction. double is computed one element at a time, with libm.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define FUSED_TARGET avx512
#define FUSED_AVX512 1
#define FUSED_LANES 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define FUSED_TARGET avx2
#define FUSED_AVX2 1
#define FUSED_LANES 8
#else
#define FUSED_TARGET portable
#define FUSED_LANES 4
#endif

// On the bodies of loops: one that is not inlined holds its captures in memory, and every store
// might change them.
#define FUSED_INLINE __attribute__((always_inline))

namespace fused::FUSED_TARGET {

typedef float f32v __attribute__((vector_size(4 * FUSED_LANES)));
typedef int32_t i32v __attribute__((vector_size(4 * FUSED_LANES)));
typedef uint32_t u32v __attribute__((vector_size(4 * FUSED_LANES)));
typedef uint16_t u16v __attribute__((vector_size(2 * FUSED_LANES)));

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The type that a storage type is computed in, and the vector of that type.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <class C>
using Vector = std::conditional_t<std::is_same_v<C, double>, double, f32v>;
template <class V>
constexpr int kLanesOf = std::is_same_v<V, double> ? 1 : FUSED_LANES;

// How many lanes an operation touches: All, or a number below the width at the end of a row.
template <class V>
using All = std::integral_constant<int, kLanesOf<V>>;

template <class V>
inline V broadcast(double x) {
  if constexpr (std::is_same_v<V, double>) {
    return x;
  } else {
    return static_cast<float>(x) - V{};  // not V{} + x, which makes 0 of −0
  }
}

inline f32v select(i32v condition, f32v yes, f32v no) { return condition ? yes : no; }
inline double select(bool condition, double yes, double no) { return condition ? yes : no; }

inline f32v as_float(u32v x) { return (f32v)x; }
inline u32v as_bits(f32v x) { return (u32v)x; }

inline i32v lane_index() {
  i32v index;
  for (int lane = 0; lane < FUSED_LANES; ++lane) index[lane] = lane;
  return index;
}

// Zero in lanes ≥ n.
inline f32v first_lanes(f32v x, All<f32v>) { return x; }
inline f32v first_lanes(f32v x, int n) { return lane_index() < n ? x : f32v{}; }
inline double first_lanes(double x, int) { return x; }

inline float sum_lanes(f32v x) {
#if FUSED_AVX512
  return _mm512_reduce_add_ps((__m512)x);
#else
  float total[FUSED_LANES];
  memcpy(total, &x, sizeof(x));
  for (int half = FUSED_LANES / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) total[lane] += total[lane + half];
  }
  return total[0];
#endif
}
inline double sum_lanes(double x) { return x; }

// 16-bit words of memory; lanes ≥ n read as zero and are not written.
inline u16v load_words(const uint16_t* p, All<f32v>) {
  u16v x;
  memcpy(&x, p, sizeof(x));
  return x;
}
inline u16v load_words(const uint16_t* p, int n) {
#if FUSED_AVX512
  return (u16v)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
#else
  u16v x{};
  memcpy(&x, p, 2 * static_cast<size_t>(n));
  return x;
#endif
}
inline void store_words(uint16_t* p, u16v x, All<f32v>) { memcpy(p, &x, sizeof(x)); }
inline void store_words(uint16_t* p, u16v x, int n) {
#if FUSED_AVX512
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), (__m256i)x);
#else
  memcpy(p, &x, 2 * static_cast<size_t>(n));
#endif
}

inline f32v load(const float* p, All<f32v>) {
  f32v x;
  memcpy(&x, p, sizeof(x));
  return x;
}
inline f32v load(const float* p, int n) {
#if FUSED_AVX512
  return (f32v)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#else
  f32v x{};
  memcpy(&x, p, 4 * static_cast<size_t>(n));
  return x;
#endif
}
inline void store(float* p, f32v x, All<f32v>) { memcpy(p, &x, sizeof(x)); }
inline void store(float* p, f32v x, int n) {
#if FUSED_AVX512
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)x);
#else
  memcpy(p, &x, 4 * static_cast<size_t>(n));
#endif
}

inline double load(const double* p, int) { return *p; }
inline void store(double* p, double x, int) { *p = x; }

// As doubles, times a factor.
typedef double f64v __attribute__((vector_size(8 * FUSED_LANES)));
inline void store_doubles(double* p, f32v x, double factor, All<f32v>) {
  const f64v wide = __builtin_convertvector(x, f64v) * factor;
  memcpy(p, &wide, sizeof(wide));
}
inline void store_doubles(double* p, f32v x, double factor, int n) {
  for (int lane = 0; lane < n; ++lane) p[lane] = static_cast<double>(x[lane]) * factor;
}
inline void store_doubles(double* p, double x, double factor, int) { *p = x * factor; }
inline void add_doubles(double* p, f32v x, double factor, All<f32v>) {
  f64v sum;
  memcpy(&sum, p, sizeof(sum));
  sum += __builtin_convertvector(x, f64v) * factor;
  memcpy(p, &sum, sizeof(sum));
}
inline void add_doubles(double* p, f32v x, double factor, int n) {
  for (int lane = 0; lane < n; ++lane) p[lane] += static_cast<double>(x[lane]) * factor;
}
inline void add_doubles(double* p, double x, double factor, int) { *p += x * factor; }

inline f32v from_words(u16v x, const bfloat16*) {
  return as_float(__builtin_convertvector(x, u32v) << 16);
}
// Round to nearest, ties to even. (VCVTNEPS2BF16 would flush denormals.)
inline u16v to_words(f32v x, const bfloat16*) {
  const u32v bits = as_bits(x);
  const u32v rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const u32v quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector(x != x ? quiet : rounded, u16v);
}

#if FUSED_AVX512
inline f32v from_words(u16v x, const float16*) { return (f32v)_mm512_cvtph_ps((__m256i)x); }
inline u16v to_words(f32v x, const float16*) {
  return (u16v)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif FUSED_AVX2
inline f32v from_words(u16v x, const float16*) { return (f32v)_mm256_cvtph_ps((__m128i)x); }
inline u16v to_words(f32v x, const float16*) {
  return (u16v)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
}
#else
// Exponent re-based by a multiplication, which also normalises half denormals.
inline f32v from_words(u16v x, const float16*) {
  const u32v bits = __builtin_convertvector(x, u32v);
  const u32v magnitude = (bits & 0x7FFFu) << 13;
  const u32v finite = as_bits(as_float(magnitude) * 0x1p112f);
  const u32v special = magnitude | 0x7F800000u;
  return as_float((magnitude >= 0x0F800000u ? special : finite) | ((bits & 0x8000u) << 16));
}
inline u16v to_words(f32v x, const float16*) {
  const u32v bits = as_bits(x);
  const u32v sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  const u32v odd = (magnitude >> 13) & 1u;
  const u32v normal = (magnitude - 0x38000000u + 0xFFFu + odd) >> 13;
  // Adding 0.5 leaves the half denormal, rounded to nearest even, in the low bits.
  const u32v denormal = as_bits(as_float(magnitude) + 0.5f) - 0x3F000000u;
  u32v half = magnitude < 0x38800000u ? denormal : normal;
  half = magnitude >= 0x477FF000u ? (u32v{} + 0x7C00u) : half;
  half = magnitude > 0x7F800000u ? (0x7E00u | ((magnitude >> 13) & 0x3FFu)) : half;
  return __builtin_convertvector(half | sign, u16v);
}
#endif

template <class T, class N>
  requires(sizeof(T) == 2)
inline f32v load(const T* p, N n) {
  return from_words(load_words(&p->bits, n), p);
}
template <class T, class N>
  requires(sizeof(T) == 2)
inline void store(T* p, f32v x, N n) {
  store_words(&p->bits, to_words(x, p), n);
}

// A store that bypasses the caches, for outputs larger than the last level. The address must be
// aligned to the vector; the caller fences.
inline void store_streaming(float* p, f32v x) {
#if FUSED_AVX512
  _mm512_stream_ps(p, (__m512)x);
#elif FUSED_AVX2
  _mm256_stream_ps(p, (__m256)x);
#else
  memcpy(p, &x, sizeof(x));
#endif
}
template <class T>
  requires(sizeof(T) == 2)
inline void store_streaming(T* p, f32v x) {
  const u16v words = to_words(x, p);
#if FUSED_AVX512
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)words);
#elif FUSED_AVX2
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)words);
#else
  memcpy(p, &words, sizeof(words));
#endif
}
inline void store_streaming(double* p, double x) { *p = x; }

inline void fence_streaming() {
#if FUSED_AVX512 || FUSED_AVX2
  _mm_sfence();
#endif
}

// Calls body(i, lanes) over [begin, end): All lanes, then the rest of the row if there is one.
template <class V, class F>
FUSED_INLINE inline void for_each_vector(int64_t begin, int64_t end, const F& body) {
  int64_t i = begin;
  for (; i + kLanesOf<V> <= end; i += kLanesOf<V>) body(i, All<V>{});
  if (i < end) body(i, static_cast<int>(end - i));
}

}  // namespace fused::FUSED_TARGET
