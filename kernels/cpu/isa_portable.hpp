// Any machine: vectors of 16 in the compiler's vector extension, which it maps to what the target has.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/cpu/inline.hpp"
#include "kernels/decode.hpp"

namespace cutlass_ext::cpu::portable {

struct Isa {
  typedef float F __attribute__((vector_size(64)));     // 16 fp32
  typedef uint32_t I __attribute__((vector_size(64)));  // 16 words of 32 bits

  static constexpr bool kManyRegisters = false;
  // Tokens of a register tile: its two weight vectors are already half of 16 registers of 128 bits.
  static constexpr int kTileTokens = 1;

  static bool available() { return true; }

  static CX_INLINE F zero() { return F{}; }
  static CX_INLINE F set1(float a) { return F{} + a; }
  static CX_INLINE F load(const float* p) {
    F a;
    memcpy(&a, p, sizeof a);
    return a;
  }
  static CX_INLINE void store(float* p, F a) { memcpy(p, &a, sizeof a); }
  static CX_INLINE F add(F a, F b) { return a + b; }
  static CX_INLINE F sub(F a, F b) { return a - b; }
  static CX_INLINE F mul(F a, F b) { return a * b; }
  static CX_INLINE F fma(F a, F b, F c) { return a * b + c; }
  // a as it is: keeps the compiler from fusing the product with a following addition.
  static CX_INLINE F rounded(F a) {
    asm("" : "+m"(a));
    return a;
  }
  static CX_INLINE F to_float(I a) {
    F b;
    for (int i = 0; i < 16; ++i) b[i] = static_cast<float>(static_cast<int32_t>(a[i]));
    return b;
  }
  // {a, b, c, d} four times.
  static CX_INLINE F repeat4(float a, float b, float c, float d) {
    return F{a, b, c, d, a, b, c, d, a, b, c, d, a, b, c, d};
  }

  static CX_INLINE F load_fp16(const uint16_t* p) {
    F a;
    for (int i = 0; i < 16; ++i) a[i] = fp16_to_float(p[i]);
    return a;
  }
  static CX_INLINE F load_bf16(const uint16_t* p) {
    F a;
    for (int i = 0; i < 16; ++i) a[i] = bf16_to_float(p[i]);
    return a;
  }
  static CX_INLINE void store_fp16(uint16_t* p, F a) {
    for (int i = 0; i < 16; ++i) p[i] = float_to_fp16(a[i]);
  }
  static CX_INLINE void store_bf16(uint16_t* p, F a) {
    for (int i = 0; i < 16; ++i) p[i] = float_to_bf16(a[i]);
  }

  static CX_INLINE I load_words(const void* p) {
    I a;
    memcpy(&a, p, sizeof a);
    return a;
  }
  static CX_INLINE I load_bytes(const uint8_t* p) {
    I a;
    for (int i = 0; i < 16; ++i) a[i] = p[i];
    return a;
  }
  // Every word of p[0..7] twice, the second time shifted down by 16.
  static CX_INLINE I spread2(const void* p) {
    uint32_t words[8];
    memcpy(words, p, sizeof words);
    I a;
    for (int i = 0; i < 16; ++i) a[i] = words[i / 2] >> i % 2 * 16;
    return a;
  }
  // Every word of p[0..3] four times, shifted down by 0, 8, 16 and 24.
  static CX_INLINE I spread4(const void* p) {
    uint32_t words[4];
    memcpy(words, p, sizeof words);
    I a;
    for (int i = 0; i < 16; ++i) a[i] = words[i / 4] >> i % 4 * 8;
    return a;
  }
  // Words 0 and 2 (or 1 and 3) of each four of a, then of b.
  static CX_INLINE I even_words(I a, I b) { return words_from<0>(a, b); }
  static CX_INLINE I odd_words(I a, I b) { return words_from<1>(a, b); }
  template <int kShift>
  static CX_INLINE I shift_right(I a) {
    if constexpr (kShift < 0) return a << -kShift;
    return a >> (kShift > 0 ? kShift : 0);
  }
  static CX_INLINE I and_mask(I a, int mask) { return a & static_cast<uint32_t>(mask); }
  // The bits of a where mask is set, else those of b.
  static CX_INLINE I merge(I a, I b, int mask) {
    return (a & static_cast<uint32_t>(mask)) | (b & ~static_cast<uint32_t>(mask));
  }
  static CX_INLINE I subtract(I a, int b) { return a - static_cast<uint32_t>(b); }

  // 2^kBits entries, found by the low kBits of an index; its other bits are ignored.
  template <int kBits>
  struct Table {
    float entries[1 << kBits];

    explicit CX_INLINE Table(const float* values) { memcpy(entries, values, sizeof entries); }
    CX_INLINE F operator[](I index) const {
      F a;
      for (int i = 0; i < 16; ++i) a[i] = entries[index[i] & ((1 << kBits) - 1)];
      return a;
    }
  };

  static CX_INLINE void transpose(I (&a)[16]) {
    uint32_t words[16][16];
    memcpy(words, a, sizeof words);
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 16; ++j) a[i][j] = words[j][i];
    }
  }

  // Element i of the result is the sum of vector i.
  static CX_INLINE F sums(const F (&a)[16]) {
    F b;
    for (int i = 0; i < 16; ++i) {
      float s[16];
      memcpy(s, &a[i], sizeof s);
      for (int width = 8; width > 0; width /= 2) {
        for (int j = 0; j < width; ++j) s[j] += s[j + width];
      }
      b[i] = s[0];
    }
    return b;
  }

  // The low halves of a and b, then their high halves.
  static CX_INLINE F low_halves(F a, F b) {
    F c;
    for (int i = 0; i < 16; ++i) c[i] = i < 8 ? a[i] : b[i - 8];
    return c;
  }
  static CX_INLINE F high_halves(F a, F b) {
    F c;
    for (int i = 0; i < 16; ++i) c[i] = i < 8 ? a[i + 8] : b[i];
    return c;
  }

  // Vectors of the four slots (see codes.hpp) to 64 consecutive k.
  static CX_INLINE void to_natural(const F (&slot)[4], F (&out)[4]) {
    for (int step = 0; step < 4; ++step) {
      for (int k = 0; k < 16; ++k) out[step][k] = slot[k % 2 + k / 8 * 2][k % 8 / 2 * 4 + step];
    }
  }

 private:
  template <int kFirst>
  static CX_INLINE I words_from(I a, I b) {
    I c;
    for (int i = 0; i < 16; ++i) {
      const int word = i / 4 * 4 + i % 2 * 2 + kFirst;
      c[i] = i % 4 < 2 ? a[word] : b[word];
    }
    return c;
  }
};

}  // namespace cutlass_ext::cpu::portable
