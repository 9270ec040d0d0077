// 4-bit codes to the A operand of wgmma in registers: two policies of one main loop. A word holds the eight codes of a
// k16 step of a lane; the operand a[0..3] is (row g, k), (row g + 8, k), (row g, k + 8), (row g + 8, k + 8), two values
// each. Operands are scaled before the MMA: sums of a group would need a second set of accumulators.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/cuda/wgmma/params.hpp"

namespace cutlass_ext::cuda::wgmma {

template <class T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  __device__ static Type of(float low, float high) { return __floats2bfloat162_rn(low, high); }
};
template <>
struct Pair<__half> {
  using Type = __half2;
  __device__ static Type of(float low, float high) { return __floats2half2_rn(low, high); }
};

template <class T>
__device__ __forceinline__ typename Pair<T>::Type as_pair(uint32_t v) {
  return *reinterpret_cast<typename Pair<T>::Type*>(&v);
}
template <class P>
__device__ __forceinline__ uint32_t as_bits(P v) {
  return *reinterpret_cast<uint32_t*>(&v);
}

template <class T>
__device__ __forceinline__ float2 unpack_pair(uint32_t v) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(as_pair<T>(v));
  } else {
    return {__uint_as_float(v << 16), __uint_as_float(v & 0xFFFF0000u)};
  }
}

// What a lane makes weights of its codes with: the same value twice, for the rows g and g + 8.
struct Scale {
  uint32_t scale[2];
  uint32_t zero[2];  // integers: minus bias and zero point, in the units of decode()
  // Floating-point zeros of another type than T: what zero[] and scale[] lack. Else three roundings, of zero, scale and
  // product, would add up.
  uint32_t zero_rest[2];
  uint32_t scale_rest[2];
};

// Integers. The bits of a code at the bottom of a 16-bit number, or four bits higher, are a subnormal number: kUnit or
// 16 * kUnit times the code. One FMA makes (code - zero) * kStep of it, exactly where zeros are integers. Scales come
// multiplied with kScaleFactor, and sums are multiplied with kOutputFactor.
template <class T>
struct IntegerUnits;
template <>
struct IntegerUnits<__nv_bfloat16> {  // units of 2^-133
  static constexpr uint32_t kLow = 0x7F007F00u, kHigh = 0x7D007D00u;  // 2^127, 2^123
  static constexpr float kStep = 0x1p-6f;
  static constexpr float kScaleFactor = 1;
  static constexpr float kOutputFactor = 0x1p6f;
};
template <>
struct IntegerUnits<__half> {  // units of 2^-24; the factors keep scales and weights among the normal numbers
  static constexpr uint32_t kLow = 0x78007800u, kHigh = 0x68006800u;  // 2^15, 2^11
  static constexpr float kStep = 0x1p-9f;
  static constexpr float kScaleFactor = 0x1p6f;
  static constexpr float kOutputFactor = 0x1p3f;
};

template <class T_>
struct IntegerCodes {
  using T = T_;
  using Units = IntegerUnits<T>;
  static constexpr bool kTable = false;
  static constexpr float kScaleFactor = Units::kScaleFactor;
  static constexpr float kOutputFactor = Units::kOutputFactor;
  static constexpr float kZeroFactor = -Units::kStep;

  struct Table {};

  __device__ __forceinline__ static void decode(uint32_t w, const Table&, const Scale& s, uint32_t (&a)[4]) {
    const uint32_t w8 = w >> 8;
    a[0] = fma(w & 0x000F000Fu, Units::kLow, s.zero[0]);
    a[1] = fma(w & 0x00F000F0u, Units::kHigh, s.zero[1]);
    a[2] = fma(w8 & 0x000F000Fu, Units::kLow, s.zero[0]);
    a[3] = fma(w8 & 0x00F000F0u, Units::kHigh, s.zero[1]);
  }

 private:
  __device__ __forceinline__ static uint32_t fma(uint32_t code, uint32_t factor, uint32_t zero) {
    return as_bits(__hfma2(as_pair<T>(code), as_pair<T>(factor), as_pair<T>(zero)));
  }
};

// The codebook's 16 values lie in eight registers, low bytes and high bytes apart, and are looked up by byte permutes:
// two of eight values each, a third takes the one that the code's top bit says. No shared memory: that is what x and
// the MMA's reads of it need most.
template <class T_>
struct CodebookCodes {
  using T = T_;
  static constexpr bool kTable = true;
  static constexpr float kScaleFactor = 1;
  static constexpr float kOutputFactor = 1;
  static constexpr float kZeroFactor = 0;

  struct Table {
    uint32_t low[4], high[4];
  };

  __device__ __forceinline__ static void decode(uint32_t w, const Table& table, const Scale&, uint32_t (&a)[4]) {
    uint32_t index = w & 0x77777777u;
    uint32_t half = (w & 0x88888888u) >> 1 | 0x32103210u;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t low = __byte_perm(__byte_perm(table.low[0], table.low[1], index),
                                       __byte_perm(table.low[2], table.low[3], index), half);
      const uint32_t high = __byte_perm(__byte_perm(table.high[0], table.high[1], index),
                                        __byte_perm(table.high[2], table.high[3], index), half);
      a[2 * i] = __byte_perm(low, high, 0x5140);
      a[2 * i + 1] = __byte_perm(low, high, 0x7362);
      index >>= 16;
      half >>= 16;
    }
  }
};

}  // namespace cutlass_ext::cuda::wgmma
