// What stored numbers mean: scalar decoders for host and device.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/problem.hpp"

#ifdef __CUDACC__
#define CX_HOST_DEVICE __host__ __device__
#else
#define CX_HOST_DEVICE
#endif

namespace cutlass_ext {

// Functions have internal linkage for the reason given in kernels/layout.hpp.

CX_HOST_DEVICE static inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

CX_HOST_DEVICE static inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

CX_HOST_DEVICE static inline float bf16_to_float(uint16_t h) { return bits_to_float(uint32_t{h} << 16); }

CX_HOST_DEVICE static inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);  // NaN stays a NaN
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

CX_HOST_DEVICE static inline float fp16_to_float(uint16_t h) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(h));
  return value;
#else
  const uint32_t sign = uint32_t{h & 0x8000u} << 16;
  const uint32_t exponent = h >> 10 & 0x1Fu;
  uint32_t mantissa = h & 0x3FFu;
  if (exponent == 0x1Fu) return bits_to_float(sign | 0x7F800000u | mantissa << 13 | (mantissa ? 0x400000u : 0u));
  if (exponent != 0) return bits_to_float(sign | (exponent + 112u) << 23 | mantissa << 13);
  if (mantissa == 0) return bits_to_float(sign);
  uint32_t e = 113u;  // integers only: a subnormal of fp16 is a normal number of fp32, whatever the rounding mode
  for (; !(mantissa & 0x400u); mantissa <<= 1) --e;
  return bits_to_float(sign | e << 23 | (mantissa & 0x3FFu) << 13);
#endif
}

CX_HOST_DEVICE static inline uint16_t float_to_fp16(float value) {
#ifdef __CUDA_ARCH__
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(value));
  return h;
#else
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u | (magnitude >> 13 & 0x3FFu));
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // >= 65520 rounds to infinity
  if (magnitude >= 0x38800000u) {                                              // >= 2^-14: normal
    const uint32_t rounded = magnitude + 0xFFFu + (magnitude >> 13 & 1u);
    return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
  }
  if (magnitude < 0x33000000u) return static_cast<uint16_t>(sign);  // < 2^-25 rounds to zero
  const uint32_t mantissa = (magnitude & 0x7FFFFFu) | 0x800000u;
  const uint32_t shift = 126u - (magnitude >> 23);  // 14..24: leaves units of 2^-24
  const uint32_t kept = mantissa >> shift;
  const uint32_t rest = mantissa & ((1u << shift) - 1u);
  const uint32_t half = 1u << (shift - 1u);
  return static_cast<uint16_t>(sign | (kept + (rest > half || (rest == half && (kept & 1u)) ? 1u : 0u)));
#endif
}

// 4 exponent and 4 mantissa bits, no sign, exponent bias 11.
CX_HOST_DEVICE static inline float e4m4_to_float(uint8_t s) {
  const uint32_t exponent = s >> 4;
  const uint32_t mantissa = s & 15u;
  if (exponent != 0) return bits_to_float((exponent + 116u) << 23 | mantissa << 19);
  return static_cast<float>(mantissa) * 0x1p-14f;
}

// OCP float8_e4m3fn: no infinity, NaN is 0x7F.
CX_HOST_DEVICE static inline float e4m3_to_float(uint8_t s) {
  const uint32_t sign = uint32_t{s & 0x80u} << 24;
  const uint32_t exponent = s >> 3 & 15u;
  const uint32_t mantissa = s & 7u;
  if ((s & 0x7Fu) == 0x7Fu) return bits_to_float(sign | 0x7FC00000u);
  if (exponent != 0) return bits_to_float(sign | (exponent + 120u) << 23 | mantissa << 20);
  const float magnitude = static_cast<float>(mantissa) * 0x1p-9f;
  return sign ? -magnitude : magnitude;
}

// OCP E8M0: a power of two; 255 is NaN.
CX_HOST_DEVICE static inline float e8m0_to_float(uint8_t s) {
  return bits_to_float(s == 255 ? 0x7FC00000u : s == 0 ? 0x00400000u : uint32_t{s} << 23);
}

// fl(fl(a * b) + c). Compilers fuse the two where the target has FMA, and then results differ between targets.
CX_HOST_DEVICE static inline float multiply_then_add(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(__fmul_rn(a, b), c);
#else
  volatile float product = a * b;
  return product + c;
#endif
}

// A number in one of the three types that scales, zeros and activations share.
CX_HOST_DEVICE static inline float load_float(const void* base, int64_t index, DType dtype) {
  switch (dtype) {
    case DType::kFp32:
      return static_cast<const float*>(base)[index];
    case DType::kFp16:
      return fp16_to_float(static_cast<const uint16_t*>(base)[index]);
    default:
      return bf16_to_float(static_cast<const uint16_t*>(base)[index]);
  }
}

CX_HOST_DEVICE static inline void store_float(void* base, int64_t index, DType dtype, float value) {
  switch (dtype) {
    case DType::kFp32:
      static_cast<float*>(base)[index] = value;
      break;
    case DType::kFp16:
      static_cast<uint16_t*>(base)[index] = float_to_fp16(value);
      break;
    default:
      static_cast<uint16_t*>(base)[index] = float_to_bf16(value);
  }
}

// The type of a scale that is stored as a floating-point number of 16 or 32 bits.
CX_HOST_DEVICE static inline DType float_type(ScaleType type) {
  return type == ScaleType::kFp32 ? DType::kFp32 : type == ScaleType::kFp16 ? DType::kFp16 : DType::kBf16;
}

CX_HOST_DEVICE static inline float tensor_scale(const Weight& w) { return w.tensor_scale ? *w.tensor_scale : 1.0f; }
CX_HOST_DEVICE static inline float nested_offset(const Weight& w) { return w.nested_offset ? *w.nested_offset : 0.0f; }

// The scale stored at `index`. `group` numbers the group over the whole weight, row by row (n * groups + k / g, or
// (n * K + k) / g where scales are flat): nested absmax values share a second level by it.
CX_HOST_DEVICE static inline float decode_scale(const Weight& w, int64_t index, int64_t group) {
  const uint8_t* bytes = static_cast<const uint8_t*>(w.scales);
  switch (w.scale_type) {
    case ScaleType::kE4M4:
      return e4m4_to_float(bytes[index]);
    case ScaleType::kE4M3:
      return e4m3_to_float(bytes[index]) * tensor_scale(w);
    case ScaleType::kE8M0:
      return e8m0_to_float(bytes[index]);
    case ScaleType::kNested:
      return multiply_then_add(w.nested_map[bytes[index]], w.nested_absmax[group / kNestedBlock], nested_offset(w));
    default:
      return load_float(w.scales, index, float_type(w.scale_type));
  }
}

CX_HOST_DEVICE static inline float decode_zero(const Weight& w, int64_t index) {
  return w.zero_type == ZeroType::kInteger ? static_cast<float>(static_cast<const uint8_t*>(w.zeros)[index])
                                           : load_float(w.zeros, index, float_type(w.scale_type));
}

}  // namespace cutlass_ext
