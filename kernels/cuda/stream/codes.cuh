// 4-bit codes to MMA operands: two policies of one main loop. A word holds the eight codes of a k16 step of a lane; the
// operand a[0..3] is (row g, k), (row g + 8, k), (row g, k + 8), (row g + 8, k + 8), two values each.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cute/arch/mma_sm80.hpp>

#include "kernels/cuda/stream/params.hpp"

namespace cutlass_ext::cuda::stream {

template <class T>
struct Mma;
template <>
struct Mma<__nv_bfloat16> {
  using Atom = cute::SM80_16x8x16_F32BF16BF16F32_TN;
  static constexpr uint32_t kOnes = 0x3F803F80u;
};
template <>
struct Mma<__half> {
  using Atom = cute::SM80_16x8x16_F32F16F16F32_TN;
  static constexpr uint32_t kOnes = 0x3C003C00u;
};

template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                         const float (&c)[4]) {
  Mma<T>::Atom::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], c[2], c[3]);
}

template <class T>
__device__ __forceinline__ float2 unpack_pair(uint32_t v) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(*reinterpret_cast<const __half2*>(&v));
  } else {
    return {__uint_as_float(v << 16), __uint_as_float(v & 0xFFFF0000u)};
  }
}

template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  const T pair[2] = {T(low), T(high)};
  return uint32_t(*reinterpret_cast<const uint16_t*>(&pair[0])) | uint32_t(*reinterpret_cast<const uint16_t*>(&pair[1]))
                                                                      << 16;
}

template <uint32_t kMask, uint32_t kMagic>
__device__ __forceinline__ uint32_t mask_or(uint32_t w) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(w), "n"(kMask), "n"(kMagic));  // (w & mask) | magic
  return r;
}

// Integers: a code in the low mantissa bits of a power of two is magic + code, exactly. The sum over k is then too
// large by (magic + bias) * sum(x), which the accumulator starts from with the opposite sign. Rows g + 8 may come
// multiplied by kHighRows, for which their scale makes up.
template <class T_>
struct IntegerCodes;

template <>
struct IntegerCodes<__nv_bfloat16> {
  using T = __nv_bfloat16;
  static constexpr bool kTable = false;
  static constexpr float kMagic = 128;
  static constexpr float kHighRows = 1;  // factor of the rows g + 8

  __device__ static void decode(uint32_t w, uint32_t, uint32_t (&a)[4]) {
    a[0] = mask_or<0x000F000Fu, 0x43004300u>(w);
    a[1] = mask_or<0x000F000Fu, 0x43004300u>(w >> 4);
    a[2] = mask_or<0x000F000Fu, 0x43004300u>(w >> 8);
    a[3] = mask_or<0x000F000Fu, 0x43004300u>(w >> 12);
  }
};

// fp16 has mantissa bits enough to leave the second code of a byte where it is: times 16.
template <>
struct IntegerCodes<__half> {
  using T = __half;
  static constexpr bool kTable = false;
  static constexpr float kMagic = 1024;
  static constexpr float kHighRows = 16;

  __device__ static void decode(uint32_t w, uint32_t, uint32_t (&a)[4]) {
    a[0] = mask_or<0x000F000Fu, 0x64006400u>(w);
    a[1] = mask_or<0x00F000F0u, 0x64006400u>(w);
    w >>= 8;
    a[2] = mask_or<0x000F000Fu, 0x64006400u>(w);
    a[3] = mask_or<0x00F000F0u, 0x64006400u>(w);
  }
};

// Codebooks: a byte of two codes is the index of a pair of values in shared memory, of which every bank has a copy.
template <class T_>
struct CodebookCodes {
  using T = T_;
  static constexpr bool kTable = true;
  static constexpr float kMagic = 1;
  static constexpr float kHighRows = 1;

  template <int kByte>
  __device__ static uint32_t pair(uint32_t w, uint32_t lane_address) {
    uint32_t address, v;  // byte 1: the codes; byte 0: the lane's bank; byte 3: the CTA's window
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(address) : "r"(w), "r"(lane_address), "n"(0x7604 | kByte << 4));
    // Not volatile: the table does not change once it is built, so the compiler may schedule the lookups.
    asm("ld.shared.u32 %0, [%1+%2];" : "=r"(v) : "r"(address), "n"(kSharedBase));
    return v;
  }

  __device__ static void decode(uint32_t w, uint32_t lane_address, uint32_t (&a)[4]) {
    a[0] = pair<0>(w, lane_address);
    a[1] = pair<1>(w, lane_address);
    a[2] = pair<2>(w, lane_address);
    a[3] = pair<3>(w, lane_address);
  }
};

}  // namespace cutlass_ext::cuda::stream
