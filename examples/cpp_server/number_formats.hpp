// Values of the narrow number formats that checkpoints hold. All of them are exact in fp32.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float float_from_bf16(uint16_t bits) { return float_from_bits(uint32_t{bits} << 16); }

inline float float_from_fp16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float magnitude =
      exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
      : exponent == 31 ? (mantissa ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity())
                       : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  return bits >> 15 ? -magnitude : magnitude;
}

// Unsigned, 4 bits of exponent with bias 11, 4 of mantissa: 2^-14 .. 31.
inline float float_from_e4m4(uint8_t bits) {
  const int exponent = bits >> 4, mantissa = bits & 15;
  return exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -14)
                       : std::ldexp(static_cast<float>(16 + mantissa), exponent - 15);
}

// OCP float8_e4m3fn: signed, bias 7, no infinity.
inline float float_from_e4m3(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  if (exponent == 15 && mantissa == 7) return std::numeric_limits<float>::quiet_NaN();
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                        : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return bits >> 7 ? -magnitude : magnitude;
}

// OCP MX: a power of two, bias 127.
inline float float_from_e8m0(uint8_t bits) {
  return bits == 255 ? std::numeric_limits<float>::quiet_NaN() : std::ldexp(1.0f, bits - 127);
}
