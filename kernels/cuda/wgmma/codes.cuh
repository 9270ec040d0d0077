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
  uint32_t zero[2];  // integers: what is added to a code, in the units of decode()
  // What zero[] and scale[] lack, where more than two roundings would add up: codebooks, and floating-point zeros of
  // another type than T.
  uint32_t zero_rest[2];
  uint32_t scale_rest[2];
};

// What a kernel can do with scales; the less, the fewer instructions.
enum class Scaling {
  kFused,     // integers without zero points: scaled and centered by one FMA
  kPerBlock,  // groups of a block at least; zero points that are integers or of x's type
  kFine,      // every group size and zero point
};

// Integers. The bits of a code at the bottom of a 16-bit number, or four bits higher, are a subnormal number: kUnit or
// 16 * kUnit times the code. In the rows g codes stand at the bottom, in the rows g + 8 higher.
//   fused   one FMA: code * scale - bias * scale, rounded once, because the bias is a power of two. bf16 without zeros
//   exact   one FMA makes (code - zero) * kStep, exactly where zeros are integers; then the scale
// Scales come multiplied with a factor, and sums are multiplied with what undoes it.
template <class T>
struct IntegerUnits;
template <>
struct IntegerUnits<__nv_bfloat16> {  // units of 2^-133
  static constexpr bool kFuses = true;
  static constexpr float kFusedScale = 0x1p100f, kFusedZero = -0x1p-33f,
                         kFusedOutput = 0x1p33f;                      // scales: 2^-90 .. 2^27
  static constexpr uint32_t kLow = 0x7F007F00u, kHigh = 0x7D007D00u;  // 2^127, 2^123
  static constexpr float kStep = 0x1p-6f, kScale = 1, kOutput = 0x1p6f;
};
template <>
struct IntegerUnits<__half> {  // units of 2^-24; the factors keep scales and weights among the normal numbers
  static constexpr bool kFuses = false;
  static constexpr float kFusedScale = 0, kFusedZero = 0, kFusedOutput = 0;
  static constexpr uint32_t kLow = 0x78007800u, kHigh = 0x68006800u;  // 2^15, 2^11
  static constexpr float kStep = 0x1p-9f, kScale = 0x1p6f, kOutput = 0x1p3f;
};

template <class T_, Scaling kScaling, int kTokens>
struct IntegerCodes {
  using T = T_;
  using Units = IntegerUnits<T>;
  static constexpr bool kTable = false;
  static constexpr bool kPairTable = false;
  static constexpr bool kFine = kScaling == Scaling::kFine;
  static constexpr bool kFused = kScaling == Scaling::kFused;
  static constexpr bool kCanFuse = Units::kFuses;
  static constexpr float kOutputFactor = kFused ? Units::kFusedOutput : Units::kOutput;

  struct Table {};

  // The operands of a k16 step.
  __device__ __forceinline__ static void decode(uint32_t w, const Table&, const Scale& s, bool has_rest,
                                                uint32_t (&a)[4]) {
    const uint32_t w8 = w >> 8;
    const uint32_t codes[4] = {w & 0x000F000Fu, w & 0x00F000F0u, w8 & 0x000F000Fu, w8 & 0x00F000F0u};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t factor = kFused ? s.scale[i & 1] : i & 1 ? Units::kHigh : Units::kLow;
      a[i] = as_bits(__hfma2(as_pair<T>(codes[i]), as_pair<T>(factor), as_pair<T>(s.zero[i & 1])));
    }
    if constexpr (!kFused) {
      if (kFine && has_rest) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          // v is rounded, the weight is; adding the zero point's rest to v first would round a third time, which is
          // beyond 1.5 times the error of a weight rounded once.
          const auto v = as_pair<T>(a[i]), scale = as_pair<T>(s.scale[i & 1]);
          const auto rest = __hfma2(as_pair<T>(s.zero_rest[i & 1]), scale, __hmul2(v, as_pair<T>(s.scale_rest[i & 1])));
          a[i] = as_bits(__hfma2(v, scale, rest));
        }
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = as_bits(__hmul2(as_pair<T>(a[i]), as_pair<T>(s.scale[i & 1])));
      }
    }
  }

  // What a scale and a zero point of a row g (0) or g + 8 (1) are stored as; `zero` includes the bias.
  __device__ __forceinline__ static float stored_scale(int row, float scale) {
    return scale * (kFused ? row == 0 ? Units::kFusedScale : Units::kFusedScale / 16 : Units::kScale);
  }
  __device__ __forceinline__ static float stored_zero(float zero, float scale) {
    return kFused ? zero * scale * Units::kFusedZero : zero * -Units::kStep;
  }
};

// Codebooks. Scales have a second part, because the values are already rounded: value * scale + value * rest.
// Up to kPairTokens tokens a byte of two codes is the index of a pair of values in shared memory, of which every bank
// has a copy. Above, shared memory is what x and the MMA's reads of it need most: the 16 values lie in eight registers,
// low bytes and high bytes apart, and are looked up by byte permutes, two of eight values each, and a third that takes
// the one that the code's top bit says.
constexpr int kPairTokens = 64;

template <class T_, Scaling kScaling, int kTokens>
struct CodebookCodes {
  using T = T_;
  static constexpr bool kTable = true;
  static constexpr bool kFine = kScaling == Scaling::kFine;
  static constexpr bool kFused = false;
  static constexpr bool kCanFuse = false;
  static constexpr bool kPairTable = kTokens <= kPairTokens;
  static constexpr float kOutputFactor = 1;

  struct Table {
    uint32_t lane_address;  // of the pair table's copy in the lane's bank, without the table's own address
    uint32_t low[4], high[4];
  };

  __device__ __forceinline__ static void decode(uint32_t w, const Table& table, const Scale& s, bool,
                                                uint32_t (&a)[4]) {
    if constexpr (kPairTable) {
      a[0] = pair<0>(w, table.lane_address);
      a[1] = pair<1>(w, table.lane_address);
      a[2] = pair<2>(w, table.lane_address);
      a[3] = pair<3>(w, table.lane_address);
    } else {
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
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto v = as_pair<T>(a[i]);
      a[i] = as_bits(__hfma2(v, as_pair<T>(s.scale[i & 1]), __hmul2(v, as_pair<T>(s.scale_rest[i & 1]))));
    }
  }

  __device__ __forceinline__ static float stored_scale(int, float scale) { return scale; }
  __device__ __forceinline__ static float stored_zero(float, float) { return 0; }

 private:
  template <int kByte>
  __device__ __forceinline__ static uint32_t pair(uint32_t w, uint32_t lane_address) {
    uint32_t address, v;  // byte 1: the codes; byte 0: the lane's bank; byte 3: the CTA's window
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(address) : "r"(w), "r"(lane_address), "n"(0x7604 | kByte << 4));
    // Not volatile: the table does not change once it is built, so the compiler may schedule the lookups.
    asm("ld.shared.u32 %0, [%1+%2];" : "=r"(v) : "r"(address), "n"(kSharedBase));
    return v;
  }
};

}  // namespace cutlass_ext::cuda::wgmma
