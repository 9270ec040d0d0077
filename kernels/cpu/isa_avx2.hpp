// AVX2, FMA and F16C: vectors of 16, two registers each.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/cpu/inline.hpp"

namespace cutlass_ext::cpu::avx2 {

struct Isa {
  struct F {  // 16 fp32
    __m256 low, high;
  };
  struct I {  // 16 words of 32 bits
    __m256i low, high;
  };

  static constexpr bool kManyRegisters = false;
  // Tokens of a register tile: 3 x 4 accumulators, three broadcasts and one weight vector fill 16 registers.
  static constexpr int kTileTokens = 3;

  static bool available() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }

  static CX_INLINE F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static CX_INLINE F set1(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
  static CX_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static CX_INLINE void store(float* p, F a) {
    _mm256_storeu_ps(p, a.low);
    _mm256_storeu_ps(p + 8, a.high);
  }
  static CX_INLINE F add(F a, F b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
  static CX_INLINE F sub(F a, F b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
  static CX_INLINE F mul(F a, F b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
  static CX_INLINE F fma(F a, F b, F c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
  // a as it is: keeps the compiler from fusing the product with a following addition.
  static CX_INLINE F rounded(F a) {
    asm("" : "+x"(a.low), "+x"(a.high));
    return a;
  }
  static CX_INLINE F to_float(I a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
  // {a, b, c, d} four times.
  static CX_INLINE F repeat4(float a, float b, float c, float d) {
    const __m256 ab = _mm256_blend_ps(_mm256_set1_ps(a), _mm256_set1_ps(b), 0x22);
    const __m256 cd = _mm256_blend_ps(_mm256_set1_ps(c), _mm256_set1_ps(d), 0x88);
    const __m256 all = _mm256_blend_ps(ab, cd, 0xCC);
    return {all, all};
  }

  static CX_INLINE F load_fp16(const uint16_t* p) { return {_mm256_cvtph_ps(half(p)), _mm256_cvtph_ps(half(p + 8))}; }
  static CX_INLINE F load_bf16(const uint16_t* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half(p)), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half(p + 8)), 16))};
  }
  static CX_INLINE void store_fp16(uint16_t* p, F a) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.low, kNearest));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.high, kNearest));
  }
  static CX_INLINE void store_bf16(uint16_t* p, F a) {
    const __m256i packed = _mm256_packus_epi32(bf16_bits(a.low), bf16_bits(a.high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xD8));
  }

  static CX_INLINE I load_words(const void* p) {
    const __m256i* words = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(words), _mm256_loadu_si256(words + 1)};
  }
  static CX_INLINE I load_bytes(const uint8_t* p) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)))};
  }
  // Every word of p[0..7] twice, the second time shifted down by 16.
  static CX_INLINE I spread2(const void* p) {
    const __m256i words = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    const __m256i shift = _mm256_set1_epi64x(int64_t{16} << 32);
    return {_mm256_srlv_epi32(_mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3)), shift),
            _mm256_srlv_epi32(_mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7)), shift)};
  }
  // Every word of p[0..3] four times, shifted down by 0, 8, 16 and 24.
  static CX_INLINE I spread4(const void* p) {
    const __m256i words = _mm256_castsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    const __m256i shift = _mm256_setr_epi32(0, 8, 16, 24, 0, 8, 16, 24);
    return {_mm256_srlv_epi32(_mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)), shift),
            _mm256_srlv_epi32(_mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3)), shift)};
  }
  // Words 0 and 2 (or 1 and 3) of each four of a, then of b.
  static CX_INLINE I even_words(I a, I b) { return {words_of<0x88>(a.low, b.low), words_of<0x88>(a.high, b.high)}; }
  static CX_INLINE I odd_words(I a, I b) { return {words_of<0xDD>(a.low, b.low), words_of<0xDD>(a.high, b.high)}; }
  template <int kShift>
  static CX_INLINE I shift_right(I a) {
    if constexpr (kShift < 0) return {_mm256_slli_epi32(a.low, -kShift), _mm256_slli_epi32(a.high, -kShift)};
    return {_mm256_srli_epi32(a.low, kShift), _mm256_srli_epi32(a.high, kShift)};
  }
  static CX_INLINE I and_mask(I a, int mask) {
    const __m256i m = _mm256_set1_epi32(mask);
    return {_mm256_and_si256(a.low, m), _mm256_and_si256(a.high, m)};
  }
  // The bits of a where mask is set, else those of b.
  static CX_INLINE I merge(I a, I b, int mask) {
    const __m256i m = _mm256_set1_epi32(mask);
    return {_mm256_or_si256(_mm256_and_si256(a.low, m), _mm256_andnot_si256(m, b.low)),
            _mm256_or_si256(_mm256_and_si256(a.high, m), _mm256_andnot_si256(m, b.high))};
  }
  static CX_INLINE I subtract(I a, int b) {
    return {_mm256_sub_epi32(a.low, _mm256_set1_epi32(b)), _mm256_sub_epi32(a.high, _mm256_set1_epi32(b))};
  }

  // 2^kBits entries, found by the low kBits of an index; its other bits are ignored.
  template <int kBits>
  struct Table {
    static constexpr int kParts = kBits <= 3 ? 1 : 1 << (kBits - 3);
    __m256 entries[kParts];

    explicit CX_INLINE Table(const float* values) {
      alignas(32) float repeated[8 * kParts];
      for (int i = 0; i < 8 * kParts; ++i) repeated[i] = values[i % (1 << kBits)];
      for (int i = 0; i < kParts; ++i) entries[i] = _mm256_load_ps(repeated + 8 * i);
    }
    CX_INLINE F operator[](I index) const { return {find(index.low), find(index.high)}; }

   private:
    CX_INLINE __m256 find(__m256i index) const {
      __m256 found[kParts];
      for (int i = 0; i < kParts; ++i) found[i] = _mm256_permutevar8x32_ps(entries[i], index);
      if constexpr (kBits == 5) {
        const __m256 bit4 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 27));
        found[0] = _mm256_blendv_ps(found[0], found[2], bit4);
        found[1] = _mm256_blendv_ps(found[1], found[3], bit4);
      }
      if constexpr (kBits >= 4) {
        return _mm256_blendv_ps(found[0], found[1], _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
      }
      return found[0];
    }
  };

  static CX_INLINE void transpose(I (&a)[16]) {
    __m256i rows[4][8];
    for (int i = 0; i < 8; ++i) {
      rows[0][i] = a[i].low;
      rows[1][i] = a[i].high;
      rows[2][i] = a[i + 8].low;
      rows[3][i] = a[i + 8].high;
    }
    for (int i = 0; i < 4; ++i) transpose8(rows[i]);
    for (int i = 0; i < 8; ++i) {
      a[i] = {rows[0][i], rows[2][i]};
      a[i + 8] = {rows[1][i], rows[3][i]};
    }
  }

  // Element i of the result is the sum of vector i.
  static CX_INLINE F sums(const F (&a)[16]) { return {sums8(a), sums8(a + 8)}; }

  // The low halves of a and b, then their high halves.
  static CX_INLINE F low_halves(F a, F b) { return {a.low, b.low}; }
  static CX_INLINE F high_halves(F a, F b) { return {a.high, b.high}; }

  // Vectors of the four slots (see codes.hpp) to 64 consecutive k.
  static CX_INLINE void to_natural(const F (&slot)[4], F (&out)[4]) {
    for (int half_k = 0; half_k < 2; ++half_k) {
      const F a = slot[2 * half_k], b = slot[2 * half_k + 1];
      const __m256d low0 = _mm256_castps_pd(_mm256_unpacklo_ps(a.low, b.low));
      const __m256d low1 = _mm256_castps_pd(_mm256_unpacklo_ps(a.high, b.high));
      const __m256d high0 = _mm256_castps_pd(_mm256_unpackhi_ps(a.low, b.low));
      const __m256d high1 = _mm256_castps_pd(_mm256_unpackhi_ps(a.high, b.high));
      const __m256d pairs[4] = {_mm256_unpacklo_pd(low0, low1), _mm256_unpackhi_pd(low0, low1),
                                _mm256_unpacklo_pd(high0, high1), _mm256_unpackhi_pd(high0, high1)};
      for (int step = 0; step < 4; ++step) {
        const __m256 part = _mm256_castpd_ps(_mm256_permute4x64_pd(pairs[step], 0xD8));
        (half_k == 0 ? out[step].low : out[step].high) = part;
      }
    }
  }

 private:
  static CX_INLINE __m128i half(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  template <int kControl>
  static CX_INLINE __m256i words_of(__m256i a, __m256i b) {
    return _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), kControl));
  }
  static CX_INLINE __m256i bf16_bits(__m256 a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i even = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
    return _mm256_srli_epi32(_mm256_blendv_epi8(even, quiet, _mm256_castps_si256(nan)), 16);
  }
  static CX_INLINE void transpose8(__m256i (&a)[8]) {
    __m256i b[8];
    for (int i = 0; i < 8; i += 2) {
      b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      b[i] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x20);
      b[i + 4] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i) a[i] = b[i];
  }
  static CX_INLINE __m256 sums8(const F* a) {
    __m256 s[8], b[4], c[2];
    for (int i = 0; i < 8; ++i) s[i] = _mm256_add_ps(a[i].low, a[i].high);
    for (int i = 0; i < 4; ++i) {
      b[i] = _mm256_add_ps(_mm256_unpacklo_ps(s[2 * i], s[2 * i + 1]), _mm256_unpackhi_ps(s[2 * i], s[2 * i + 1]));
    }
    for (int i = 0; i < 2; ++i) {
      const __m256d even = _mm256_castps_pd(b[2 * i]), odd = _mm256_castps_pd(b[2 * i + 1]);
      c[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(even, odd)),
                           _mm256_castpd_ps(_mm256_unpackhi_pd(even, odd)));
    }
    return _mm256_add_ps(_mm256_permute2f128_ps(c[0], c[1], 0x20), _mm256_permute2f128_ps(c[0], c[1], 0x31));
  }
};

}  // namespace cutlass_ext::cpu::avx2
