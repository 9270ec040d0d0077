// AVX-512 (F, BW, DQ, VL): vectors of 16, one register each.
#pragma once

// GCC 12 takes the undefined operands inside its own intrinsics for uninitialized variables (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>

#include "kernels/cpu/inline.hpp"

namespace cutlass_ext::cpu::avx512 {

struct Isa {
  using F = __m512;   // 16 fp32
  using I = __m512i;  // 16 words of 32 bits

  static constexpr bool kManyRegisters = true;  // 16 sums and what they are made of
  // Tokens of a register tile: 14 x 2 accumulators, two weight vectors and one broadcast fill 31 of 32 registers.
  static constexpr int kTileTokens = 14;

  static bool available() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }

  static CX_INLINE F zero() { return _mm512_setzero_ps(); }
  static CX_INLINE F set1(float a) { return _mm512_set1_ps(a); }
  static CX_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  static CX_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static CX_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  static CX_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static CX_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static CX_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  // a as it is: keeps the compiler from fusing the product with a following addition.
  static CX_INLINE F rounded(F a) {
    asm("" : "+v"(a));
    return a;
  }
  static CX_INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  // {a, b, c, d} four times.
  static CX_INLINE F repeat4(float a, float b, float c, float d) {
    const F ab = _mm512_mask_blend_ps(0x2222, set1(a), set1(b));
    return _mm512_mask_blend_ps(0x8888, _mm512_mask_blend_ps(0x4444, ab, set1(c)), set1(d));
  }

  static CX_INLINE F load_fp16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static CX_INLINE F load_bf16(const uint16_t* p) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  static CX_INLINE void store_fp16(uint16_t* p, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static CX_INLINE void store_bf16(uint16_t* p, F a) {
    const I bits = _mm512_castps_si512(a);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const I even = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const I rounded = _mm512_mask_or_epi32(even, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }

  static CX_INLINE I load_words(const void* p) {
    I words = _mm512_loadu_si512(p);
    asm("" : "+v"(words));  // stays in a register: the compiler would load again for each of the eight shifts
    return words;
  }
  static CX_INLINE I load_bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  // Every word of p[0..7] twice, the second time shifted down by 16.
  static CX_INLINE I spread2(const void* p) {
    const I words = _mm512_castsi256_si512(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
    const I twice = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), words);
    return _mm512_srlv_epi32(twice, _mm512_set1_epi64(int64_t{16} << 32));
  }
  // Every word of p[0..3] four times, shifted down by 0, 8, 16 and 24.
  static CX_INLINE I spread4(const void* p) {
    const I words = _mm512_castsi128_si512(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    const I times4 = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3), words);
    return _mm512_srlv_epi32(times4, _mm512_broadcast_i32x4(_mm_setr_epi32(0, 8, 16, 24)));
  }
  // Words 0 and 2 (or 1 and 3) of each four of a, then of b.
  static CX_INLINE I even_words(I a, I b) {
    return _mm512_castps_si512(_mm512_shuffle_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), 0x88));
  }
  static CX_INLINE I odd_words(I a, I b) {
    return _mm512_castps_si512(_mm512_shuffle_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), 0xDD));
  }
  template <int kShift>
  static CX_INLINE I shift_right(I a) {
    if constexpr (kShift == 0) return a;
    if constexpr (kShift < 0) return _mm512_slli_epi32(a, static_cast<unsigned>(-kShift));
    return _mm512_srli_epi32(a, static_cast<unsigned>(kShift > 0 ? kShift : 0));
  }
  static CX_INLINE I and_mask(I a, int mask) { return _mm512_and_si512(a, _mm512_set1_epi32(mask)); }
  // The bits of a where mask is set, else those of b.
  static CX_INLINE I merge(I a, I b, int mask) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi32(mask), a, b, 0xCA);
  }
  static CX_INLINE I subtract(I a, int b) { return _mm512_sub_epi32(a, _mm512_set1_epi32(b)); }

  // 2^kBits entries, found by the low kBits of an index; its other bits are ignored.
  template <int kBits>
  struct Table {
    F entries[kBits == 5 ? 2 : 1];

    explicit CX_INLINE Table(const float* values) {
      alignas(64) float repeated[32];
      for (int i = 0; i < 32; ++i) repeated[i] = values[i % (1 << kBits)];
      entries[0] = load(repeated);
      if constexpr (kBits == 5) entries[1] = load(repeated + 16);
    }
    CX_INLINE F operator[](I index) const {
      if constexpr (kBits == 5) return _mm512_permutex2var_ps(entries[0], index, entries[1]);
      return _mm512_permutexvar_ps(index, entries[0]);
    }
  };

  static CX_INLINE void transpose(I (&a)[16]) {
    I b[16];
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
      b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xDD);
      b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
      b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xDD);
    }
    for (int i = 0; i < 4; ++i) {
      a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
      a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xDD);
      a[i + 4] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88);
      a[i + 12] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xDD);
    }
  }

  // Element i of the result is the sum of vector i.
  static CX_INLINE F sums(const F (&a)[16]) {
    F b[8], c[4];
    for (int i = 0; i < 8; ++i) {
      b[i] = add(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
    }
    for (int i = 0; i < 4; ++i) {
      const __m512d even = _mm512_castps_pd(b[2 * i]), odd = _mm512_castps_pd(b[2 * i + 1]);
      c[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)), _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
    }
    const F low = add(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xDD));
    const F high = add(_mm512_shuffle_f32x4(c[2], c[3], 0x88), _mm512_shuffle_f32x4(c[2], c[3], 0xDD));
    return add(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xDD));
  }

  // The low halves of a and b, then their high halves.
  static CX_INLINE F low_halves(F a, F b) { return _mm512_shuffle_f32x4(a, b, 0x44); }
  static CX_INLINE F high_halves(F a, F b) { return _mm512_shuffle_f32x4(a, b, 0xEE); }

  // Vectors of the four slots (see codes.hpp) to 64 consecutive k.
  static CX_INLINE void to_natural(const F (&slot)[4], F (&out)[4]) {
    const I even = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
    const I odd = _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15);
    const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(slot[0], slot[1]));
    const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(slot[0], slot[1]));
    const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(slot[2], slot[3]));
    const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(slot[2], slot[3]));
    out[0] = _mm512_castpd_ps(_mm512_permutex2var_pd(low01, even, low23));
    out[1] = _mm512_castpd_ps(_mm512_permutex2var_pd(low01, odd, low23));
    out[2] = _mm512_castpd_ps(_mm512_permutex2var_pd(high01, even, high23));
    out[3] = _mm512_castpd_ps(_mm512_permutex2var_pd(high01, odd, high23));
  }
};

}  // namespace cutlass_ext::cpu::avx512
