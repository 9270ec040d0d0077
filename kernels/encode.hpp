// Numbers as they are stored: the inverses of kernels/decode.hpp, rounding as pyquant/scales.py does.
#pragma once

#include "kernels/decode.hpp"

namespace cutlass_ext {

// What is left of a value that is stored as `type`.
CX_HOST_DEVICE static inline float round_to(DType type, float value) {
  return type == DType::kFp32   ? value
         : type == DType::kFp16 ? fp16_to_float(float_to_fp16(value))
                                : bf16_to_float(float_to_bf16(value));
}

// Finite values >= 0, to nearest even with the carry into the exponent; saturates at 31.
CX_HOST_DEVICE static inline uint8_t float_to_e4m4(float value) {
  constexpr float kLargest = 31.0f;
  const uint32_t bits = float_to_bits(value < kLargest ? value : kLargest);
  if (value < 0x1p-10f) {  // steps of 2^-14; adding 2^23 rounds to an integer. 16 is the code of 2^-10.
    return static_cast<uint8_t>(float_to_bits(value * 0x1p14f + 0x1p23f) & 0xFFu);
  }
  const uint32_t code = ((bits + 0x3FFFFu + (bits >> 19 & 1u)) >> 19) - ((127u - 11u) << 4);
  return static_cast<uint8_t>(code < 255u ? code : 255u);
}

// Finite values >= 0, to nearest even; saturates at 448.
CX_HOST_DEVICE static inline uint8_t float_to_e4m3(float value) {
  constexpr float kLargest = 448.0f;
  if (value >= kLargest) return 0x7E;
  // Below 2^-6 steps of 2^-9; 8 is the code of 2^-6.
  if (value < 0x1p-6f) return static_cast<uint8_t>(float_to_bits(value * 0x1p9f + 0x1p23f) & 0xFFu);
  const uint32_t bits = float_to_bits(value);
  return static_cast<uint8_t>(((bits + 0x7FFFFu + (bits >> 20 & 1u)) >> 20) - ((127u - 7u) << 3));
}

// floor(log2(value)) of a finite value > 0.
CX_HOST_DEVICE static inline int exponent_of(float value) {
  uint32_t bits = float_to_bits(value);
  if (bits >= 0x00800000u) return static_cast<int>(bits >> 23) - 127;
  int exponent = -127;
  for (; !(bits & 0x00400000u); bits <<= 1) --exponent;
  return exponent;
}

// 2^exponent, saturating at both ends.
CX_HOST_DEVICE static inline uint8_t exponent_to_e8m0(int exponent) {
  const int code = exponent + 127;
  return static_cast<uint8_t>(code < 0 ? 0 : code > 254 ? 254 : code);
}

}  // namespace cutlass_ext
