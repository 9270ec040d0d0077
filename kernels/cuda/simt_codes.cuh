// Codes to fp32 for the simt family: what a lane holds of an atom, and the eight weights of one k16 step.
//
// Codebooks: a lookup in shared memory. A pair of codes indexes a table of value pairs (up to 4 bits: 4^bits entries),
// so that one 64-bit load decodes two weights; every half-warp lane has its own copy (128 bytes an entry), so no two
// lanes of a load meet in a bank. 5-bit codes would take 128 KB that way: they are looked up one by one, a copy per
// lane. Integers: the code becomes the mantissa of 2^23.
#pragma once

#include <cstdint>

#include "kernels/cuda/lane_codes.hpp"
#include "kernels/layout.hpp"

namespace cutlass_ext::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
// Where the lookup table stands in a thread block's shared memory, so that a lookup needs no addition: dynamic shared
// memory starts there (the first kilobyte is the system's). In a cluster the block's rank stands in bits 24 and up.
constexpr uint32_t kTableAddress = 1024;

// What a lane adds to every lookup: its block's part of the shared addresses and its copy of the table.
__device__ __forceinline__ uint32_t table_lane(const void* shared, uint32_t copy_offset) {
  const uint32_t window = static_cast<uint32_t>(__cvta_generic_to_shared(shared)) - kTableAddress;
  if ((window & 0xFFFFFFu) != 0) __trap();
  return window | copy_offset;
}
__device__ __forceinline__ uint32_t table_offset(uint32_t entry, uint32_t lane) { return entry | lane; }
#else
// Machine code for older GPUs has dynamic shared memory at 0, but their PTX also runs on newer ones: any address.
constexpr uint32_t kTableAddress = 0;

__device__ __forceinline__ uint32_t table_lane(const void* shared, uint32_t copy_offset) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + copy_offset;
}
__device__ __forceinline__ uint32_t table_offset(uint32_t entry, uint32_t lane) { return entry + lane; }
#endif

// Reads a table that was complete before the last barrier: the compiler may move and merge the loads.
__device__ __forceinline__ float2 table_pair(uint32_t offset) {
  float2 v;
  asm("ld.shared.v2.f32 {%0, %1}, [%2 + %3];" : "=f"(v.x), "=f"(v.y) : "r"(offset), "n"(kTableAddress));
  return v;
}

__device__ __forceinline__ float table_value(uint32_t offset) {
  float v;
  asm("ld.shared.f32 %0, [%1 + %2];" : "=f"(v) : "r"(offset), "n"(kTableAddress));
  return v;
}

// A field of kWidth bits moved from bit kFrom to bit kTo; all else zero.
template <int kFrom, int kWidth, int kTo>
__device__ __forceinline__ uint32_t move_field(uint32_t word) {
  constexpr uint32_t kMask = ((1u << kWidth) - 1u) << kTo;
  if constexpr (kFrom >= kTo) {
    return word >> (kFrom - kTo) & kMask;
  } else {
    return word << (kTo - kFrom) & kMask;
  }
}

template <int kBits_>
struct CodebookCodes {
  static constexpr int kBits = kBits_;
  static constexpr bool kIsCodebook = true;
  static constexpr bool kZeros = false;
  static constexpr bool kPairTable = kBits <= 4;
  static constexpr int kEntries = kPairTable ? 1 << 2 * kBits : 1 << kBits;
  static constexpr int kEntryBytes = 128;
  static constexpr int kTableBytes = kEntries * kEntryBytes;
  static constexpr auto kOrder = layout::CodeOrder::kPairs;
  using Words = LaneCodes<kBits, kOrder>;

  // All threads of the block. `value`: the codebook's entry number `lane`.
  __device__ __forceinline__ static void fill_table(uint8_t* table, float value, int thread, int threads) {
    constexpr uint32_t kAll = 0xFFFFFFFFu;
    constexpr int kPieces = kTableBytes / 16;  // a multiple of the threads
    for (int i = thread; i < kPieces; i += threads) {
      const int entry = i / (kEntryBytes / 16);
      const float first = __shfl_sync(kAll, value, kPairTable ? code_of(entry, 0) : entry);
      const float second = kPairTable ? __shfl_sync(kAll, value, code_of(entry, 1)) : first;
      reinterpret_cast<float4*>(table)[i] = make_float4(first, second, first, second);
    }
  }

  // What decoding needs beside the codes: here, the table's lane part.
  using State = uint32_t;
  __device__ __forceinline__ static State state(const void* table, int lane, int) {
    return table_lane(table, kPairTable ? lane % 16 * 8 : lane * 4);
  }

  // The weights of a step: [row g, row g + 8][k = 2t, 2t + 1, 2t + 8, 2t + 9].
  template <int kStep>
  __device__ __forceinline__ static void decode(const Words& words, uint32_t lane, float (&weights)[2][4]) {
    decode_pairs<kStep, 0>(words, lane, weights);
  }

 private:
  static constexpr int kLow = Words::kPlanes.bits[0];
  static constexpr int kHigh = Words::kPlanes.bits[1];  // 0: one plane
  static constexpr int kShift = 7;                      // log2(kEntryBytes)

  // An entry of the pair table is the two low fields, then the two high ones.
  __device__ __forceinline__ static int code_of(int entry, int which) {
    const int low = entry >> (which * kLow) & ((1 << kLow) - 1);
    const int high = entry >> (2 * kLow + which * kHigh) & ((1 << kHigh) - 1);
    return low | high << kLow;
  }

  template <int kStep, int kPair>
  __device__ __forceinline__ static void decode_pairs(const Words& words, uint32_t lane, float (&weights)[2][4]) {
    if constexpr (kPair < layout::kCodesPerStep / 2) {
      float* const out = weights[kPair % 2] + kPair / 2 * 2;
      if constexpr (kPairTable) {
        constexpr auto kAt = Words::place(kStep, 2 * kPair, 0);
        uint32_t entry = move_field<kAt.shift, 2 * kLow, kShift>(words.words[kAt.word]);
        if constexpr (kHigh != 0) {
          constexpr auto kAtHigh = Words::place(kStep, 2 * kPair, 1);
          entry |= move_field<kAtHigh.shift, 2 * kHigh, kShift + 2 * kLow>(words.words[kAtHigh.word]);
        }
        const float2 v = table_pair(table_offset(entry, lane));
        out[0] = v.x, out[1] = v.y;
      } else {
        out[0] = lookup<kStep, 2 * kPair>(words, lane);
        out[1] = lookup<kStep, 2 * kPair + 1>(words, lane);
      }
      decode_pairs<kStep, kPair + 1>(words, lane, weights);
    }
  }

  template <int kStep, int kValue>
  __device__ __forceinline__ static float lookup(const Words& words, uint32_t lane) {
    constexpr auto kAt = Words::place(kStep, kValue, 0);
    constexpr auto kAtHigh = Words::place(kStep, kValue, 1);
    const uint32_t entry = move_field<kAt.shift, kLow, kShift>(words.words[kAt.word]) |
                           move_field<kAtHigh.shift, kHigh, kShift + kLow>(words.words[kAtHigh.word]);
    return table_value(table_offset(entry, lane));
  }
};

// kZeros_: a zero point is subtracted later; else the bias is, here.
template <int kBits_, bool kZeros_>
struct IntegerCodes {
  static constexpr int kBits = kBits_;
  static constexpr bool kIsCodebook = false;
  static constexpr bool kZeros = kZeros_;
  static constexpr int kTableBytes = 0;
  static constexpr auto kOrder = layout::CodeOrder::kHalves;
  static_assert(kBits == 4 || kBits == 8);
  using Words = LaneCodes<kBits, kOrder>;

  __device__ __forceinline__ static void fill_table(uint8_t*, float, int, int) {}

  // Code c at bit b of the mantissa of 2^23 is 2^23 + c * 2^b, so (value * 2^-b) - (2^23 * 2^-b + bias) is what it
  // stands for; `offsets` has the second terms, for b = 0, 4, 8, 12.
  struct State {
    float offsets[kBits == 4 ? 4 : 1];
    uint32_t magic;
  };
  __device__ __forceinline__ static State state(const void*, int, int bias) {
    State state;
    for (int i = 0; i < (kBits == 4 ? 4 : 1); ++i) {
      state.offsets[i] = 0x1p23f / static_cast<float>(1 << 4 * i) + static_cast<float>(kZeros ? 0 : bias);
    }
    // Opaque, so that it stays in a register: of a LOP3's operands only one may be a constant.
    asm volatile("mov.b32 %0, 0x4B000000;" : "=r"(state.magic));
    return state;
  }

  // Exact.
  template <int kStep>
  __device__ __forceinline__ static void decode(const Words& words, const State& state, float (&weights)[2][4]) {
    decode_values<kStep, 0>(words, state, weights);
  }

 private:
  template <int kStep, int kValue>
  __device__ __forceinline__ static void decode_values(const Words& words, const State& state, float (&weights)[2][4]) {
    if constexpr (kValue < layout::kCodesPerStep) {
      constexpr auto kAt = Words::place(kStep, kValue, 0);
      const uint32_t word = words.words[kAt.word];
      float& out = weights[kValue / 2 % 2][kValue % 2 + kValue / 4 * 2];
      if constexpr (kBits == 8) {
        out = __uint_as_float(__byte_perm(word, state.magic, 0x7440 | kAt.shift / 8)) - state.offsets[0];
      } else {
        // The upper half-word's codes come down first: theirs would reach into the exponent.
        constexpr int kBit = kAt.shift % 16;
        const uint32_t half = kAt.shift < 16 ? word : word >> 16;
        out = __fmaf_rn(__uint_as_float((half & 0xFu << kBit) | state.magic), 1.0f / (1 << kBit),
                        -state.offsets[kBit / 4]);
      }
      decode_values<kStep, kValue + 1>(words, state, weights);
    }
  }
};

}  // namespace cutlass_ext::cuda
