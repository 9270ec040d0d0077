// Scales and zero points of a stage, of any type, to what decode multiplies with: pairs of x's type. Warps beside the
// copying one do that for all warps that multiply, while they work on the stages before.
#pragma once

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/wgmma/codes.cuh"
#include "kernels/decode.hpp"
#include "kernels/layout.hpp"

namespace cutlass_ext::cuda::wgmma {

constexpr int kResolveWarps = 3;
constexpr int kResolveThreads = kResolveWarps * 32;

// A stage gets 64 values of each kind for each group of each slab: scales; for codebooks what rounding took from them;
// for integers what is added to codes, and where zeros are of another type than x's what rounding took from both.
// The type of scales is the template's, so that a stage takes about 60 instructions and no branches: with a switch over
// types these warps took 450 clocks for 64 groups of 4 values, and warps that multiply waited for them (H200,
// 8192 x 8192, M = 64).
// Params: those of a kernel that has stages of this form.
template <class Codes, ScaleType kType, class Params = wgmma::Params>
class ScaleResolver {
 public:
  static constexpr int kValues = 4;  // of a share: neighbours in a group, for the rows g, g + 8, g + 1, g + 9
  static constexpr int kShares = layout::kBlockRows / kValues;  // of a slab's group
  static constexpr bool kNested = kType == ScaleType::kNested;

  // `shared`: address of the CTA's shared memory.
  __device__ __forceinline__ ScaleResolver(const Params& p, uint32_t shared) : p(p), shared(shared) {
    if constexpr (kNested) {
      nested_offset = __ldg(p.nested_offset);
      slab_shift = 31 - __clz(p.groups_in_chunk);
    }
  }

  // Second-level scales of a share. They come from global memory: to be requested a stage ahead.
  struct SecondLevel {
    float of[kNested ? kValues : 1];
  };

  // `share`: of the stage, whose first row is `first_row` and which is the chunk `chunk` of K.
  __device__ __forceinline__ void load_second_level(int first_row, int chunk, int share, SecondLevel& second) const {
    if constexpr (kNested) {
      const int at = share / kShares;  // slabs outside, groups inside
      const int slab = at >> slab_shift;
      const int group = p.groups_in_chunk > 1 ? (chunk << slab_shift) + (at & (p.groups_in_chunk - 1))  //
                                              : chunk >> p.group_shift;
      const int index = min(group, p.groups - 1);
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        // Rows behind N are padding: any second-level scale that exists.
        const int position = share % kShares * kValues + i;
        const int row = min(first_row + slab * layout::kBlockRows + layout::scale_row(position), p.n - 1);
        second.of[i] = __ldg(p.nested_absmax + (int64_t{row} * p.groups + index) / kNestedBlock);
      }
    }
  }

  __device__ __forceinline__ void resolve(uint32_t stage, int share, const SecondLevel& second) const {
    const int value = share * kValues;
    float scale[kValues];
    load(stage + p.scales_at + value * kScaleBytes, scale);
    if constexpr (kNested) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        const float first = load_shared_float(shared + p.nested_map_at + static_cast<uint32_t>(scale[i]) * 4);
        scale[i] = multiply_then_add(first, second.of[i], nested_offset);
      }
    }
    const uint32_t to = stage + p.resolved_at + value * 2;
    float stored[kValues], rounded[kValues];
#pragma unroll
    for (int i = 0; i < kValues; ++i) stored[i] = Codes::stored_scale(i & 1, scale[i]);
    store(to, stored, rounded);
    if constexpr (Codes::kTable) {
      store_rest(to + p.resolved_bytes, stored, rounded);
    } else {
      float zero[kValues] = {};
      if (!Codes::kFused && p.zero_type != int(ZeroType::kNone)) {
        const uint32_t zeros = stage + p.zeros_at;
        if (p.zero_type == int(ZeroType::kInteger)) {
          load_bytes(zeros + value, zero);
        } else {
          load(zeros + value * kScaleBytes, zero);
        }
      }
      // Of the rounded scale where it is fused, so that code and zero point have the same.
      const float bias = static_cast<float>(p.bias_of_codes);
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        zero[i] = Codes::stored_zero(zero[i] + bias, rounded[i] * (1 / Codes::stored_scale(i & 1, 1)));
      }
      float rounded_zero[kValues];
      store(to + p.resolved_bytes, zero, rounded_zero);
      if (Codes::kFine && p.has_rest) {
        store_rest(to + 2 * p.resolved_bytes, zero, rounded_zero);
        store_rest(to + 3 * p.resolved_bytes, stored, rounded);
      }
    }
  }

 private:
  using T = typename Codes::T;
  static constexpr int kScaleBytes = size_of(kType);

  const Params& p;
  uint32_t shared;
  float nested_offset = 0;
  int slab_shift = 0;  // log2 of the groups of a slab in a chunk

  // Rounds to T; `rounded` is what was stored.
  __device__ __forceinline__ static void store(uint32_t to, const float (&v)[kValues], float (&rounded)[kValues]) {
    const uint32_t pairs[2] = {as_bits(Pair<T>::of(v[0], v[1])), as_bits(Pair<T>::of(v[2], v[3]))};
    store_shared_8(to, make_uint2(pairs[0], pairs[1]));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 both = unpack_pair<T>(pairs[i]);
      rounded[2 * i] = both.x;
      rounded[2 * i + 1] = both.y;
    }
  }

  __device__ __forceinline__ static void store_rest(uint32_t to, const float (&v)[kValues],
                                                    const float (&rounded)[kValues]) {
    store_shared_8(to, make_uint2(as_bits(Pair<T>::of(v[0] - rounded[0], v[1] - rounded[1])),
                                  as_bits(Pair<T>::of(v[2] - rounded[2], v[3] - rounded[3]))));
  }

  __device__ __forceinline__ static void load_bytes(uint32_t from, float (&v)[kValues]) {
    const uint32_t raw = load_shared_4(from);
#pragma unroll
    for (int i = 0; i < kValues; ++i) v[i] = static_cast<float>(raw >> 8 * i & 255);
  }

  // Neighbours of the type of scales; nested absmax: as stored, indices.
  __device__ __forceinline__ static void load(uint32_t from, float (&v)[kValues]) {
    if constexpr (kType == ScaleType::kFp32) {
      const uint4 raw = load_shared_16(from);
      v[0] = __uint_as_float(raw.x);
      v[1] = __uint_as_float(raw.y);
      v[2] = __uint_as_float(raw.z);
      v[3] = __uint_as_float(raw.w);
    } else if constexpr (kScaleBytes == 2) {
      using Stored = std::conditional_t<kType == ScaleType::kFp16, __half, __nv_bfloat16>;
      const uint2 raw = load_shared_8(from);
      const float2 low = unpack_pair<Stored>(raw.x), high = unpack_pair<Stored>(raw.y);
      v[0] = low.x;
      v[1] = low.y;
      v[2] = high.x;
      v[3] = high.y;
    } else if constexpr (kNested) {
      load_bytes(from, v);
    } else {
      const uint32_t raw = load_shared_4(from);
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        const uint8_t byte = static_cast<uint8_t>(raw >> 8 * i);
        v[i] = kType == ScaleType::kE4M4   ? e4m4_to_float(byte)
               : kType == ScaleType::kE4M3 ? e4m3_to_float(byte)  // times tensor_scale, at the end
                                           : e8m0_to_float(byte);
      }
    }
  }
};

}  // namespace cutlass_ext::cuda::wgmma
