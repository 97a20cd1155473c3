// Which of 64 consecutive elements dropout keeps.
#pragma once

#include "../philox.h"
#include "vector.h"

namespace fused::FUSED_TARGET {

constexpr int kRandomBlock = 64;  // elements, eight counters

// The keys of each round, made once: the vector code loads them as it uses them.
struct PhiloxKeys {
  explicit PhiloxKeys(uint64_t seed) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      low[round] = key0;
      high[round] = key1;
      key0 += kPhiloxWeyl0;
      key1 += kPhiloxWeyl1;
    }
  }
  uint64_t low[kPhiloxRounds], high[kPhiloxRounds];
};

#if FUSED_AVX512

inline __m512i broadcast_word(const uint64_t* p) {
  return _mm512_set1_epi64(static_cast<int64_t>(*p));
}

// The 16-bit numbers of 64 elements, in element order, as two vectors. One counter per 64-bit lane.
// Only the low half of each lane is a word of the state: the products read nothing else, and what
// the high halves hold is dropped at the end.
inline void random_block(const PhiloxKeys& keys, uint64_t first, __m512i out[2]) {
  // This order makes the two interleavings below come out in element order.
  const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
  const __m512i counter = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first)), order);
  const __m512i multiplier0 = _mm512_set1_epi64(kPhiloxMultiplier0);
  const __m512i multiplier1 = _mm512_set1_epi64(kPhiloxMultiplier1);
  __m512i c0 = counter, c1 = _mm512_srli_epi64(counter, 32);
  __m512i c2 = _mm512_setzero_si512(), c3 = c2;
#pragma GCC unroll 8
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const __m512i product0 = _mm512_mul_epu32(c0, multiplier0);
    const __m512i product1 = _mm512_mul_epu32(c2, multiplier1);
    c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product1, 32), c1,
                                   broadcast_word(keys.low + round), 0x96);
    c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), c3,
                                   broadcast_word(keys.high + round), 0x96);
    c1 = product1;
    c3 = product0;
  }
  const __m512i low = _mm512_mask_mov_epi32(c0, 0xAAAA, _mm512_slli_epi64(c1, 32));
  const __m512i high = _mm512_mask_mov_epi32(c2, 0xAAAA, _mm512_slli_epi64(c3, 32));
  out[0] = _mm512_unpacklo_epi64(low, high);
  out[1] = _mm512_unpackhi_epi64(low, high);
}

#elif FUSED_AVX2

inline void random_block(const PhiloxKeys& keys, uint64_t first, uint16_t* out) {
  const __m256i multiplier0 = _mm256_set1_epi64x(kPhiloxMultiplier0);
  const __m256i multiplier1 = _mm256_set1_epi64x(kPhiloxMultiplier1);
  for (int part = 0; part < 2; ++part) {
    const __m256i order = _mm256_set_epi64x(3, 1, 2, 0);
    const __m256i counter =
        _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(first + 4 * part)), order);
    __m256i c0 = counter, c1 = _mm256_srli_epi64(counter, 32);
    __m256i c2 = _mm256_setzero_si256(), c3 = c2;
#pragma GCC unroll 8
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const __m256i product0 = _mm256_mul_epu32(c0, multiplier0);
      const __m256i product1 = _mm256_mul_epu32(c2, multiplier1);
      c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product1, 32), c1),
                            _mm256_set1_epi64x(keys.low[round]));
      c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product0, 32), c3),
                            _mm256_set1_epi64x(keys.high[round]));
      c1 = product1;
      c3 = product0;
    }
    const __m256i low = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
    const __m256i high = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
    __m256i* target = reinterpret_cast<__m256i*>(out + 32 * part);
    _mm256_storeu_si256(target, _mm256_unpacklo_epi64(low, high));
    _mm256_storeu_si256(target + 1, _mm256_unpackhi_epi64(low, high));
  }
}

#else

inline void random_block(const PhiloxKeys& keys, uint64_t first, uint16_t* out) {
  for (int group = 0; group < kRandomBlock / kElementsPerCounter; ++group) {
    const uint64_t counter = first + static_cast<uint64_t>(group);
    uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
    uint32_t c2 = 0, c3 = 0;
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const uint64_t product0 = static_cast<uint64_t>(c0) * kPhiloxMultiplier0;
      const uint64_t product1 = static_cast<uint64_t>(c2) * kPhiloxMultiplier1;
      c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ static_cast<uint32_t>(keys.low[round]);
      c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ static_cast<uint32_t>(keys.high[round]);
      c1 = static_cast<uint32_t>(product1);
      c3 = static_cast<uint32_t>(product0);
    }
    uint16_t* target = out + kElementsPerCounter * group;
    const uint32_t words[] = {c0, c1, c2, c3};
    for (int e = 0; e < kElementsPerCounter; ++e) {
      target[e] = static_cast<uint16_t>(words[e / 2] >> (16 * (e % 2)));
    }
  }
}

#endif

// Dropout's decisions for 64 elements.
struct KeepBlock {
#if FUSED_AVX512
  uint64_t bits = 0;

  // `first` is the counter of the first eight elements; threshold is in [1, 65536].
  void draw(const PhiloxKeys& keys, uint64_t first, uint32_t threshold) {
    __m512i numbers[2];
    random_block(keys, first, numbers);
    const __m512i last_dropped = _mm512_set1_epi16(static_cast<int16_t>(threshold - 1));
    bits = _mm512_cmpgt_epu16_mask(numbers[0], last_dropped) |
           static_cast<uint64_t>(_mm512_cmpgt_epu16_mask(numbers[1], last_dropped)) << 32;
  }
  // scale where the element is kept, zero where it is dropped; for the elements from `offset` on.
  f32v factor(int offset, f32v scale) const {
    return (f32v)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits >> offset), (__m512)scale);
  }
  double factor(int offset, double scale) const { return bits >> offset & 1 ? scale : 0.0; }
#else
  alignas(64) uint16_t numbers[kRandomBlock];
  uint32_t least_kept = 0;

  void draw(const PhiloxKeys& keys, uint64_t first, uint32_t threshold) {
    random_block(keys, first, numbers);
    least_kept = threshold;
  }
  f32v factor(int offset, f32v scale) const {
    const i32v found = __builtin_convertvector(load_words(numbers + offset, All<f32v>{}), i32v);
    return found >= static_cast<int32_t>(least_kept) ? scale : f32v{};
  }
  double factor(int offset, double scale) const {
    return numbers[offset] >= least_kept ? scale : 0.0;
  }
#endif
};

}  // namespace fused::FUSED_TARGET
