// Scales and zero points of a stage, of any type, to what decode multiplies with: pairs of x's type. A warp beside the
// copying one does that for all warps that multiply, while they work on the stages before.
#pragma once

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/wgmma/codes.cuh"
#include "kernels/decode.hpp"
#include "kernels/layout.hpp"

namespace cutlass_ext::cuda::wgmma {

// A stage gets 64 values of each kind for each group of each slab: scales; for codebooks what rounding took from them;
// for integers what is added to codes, and where zeros are of another type than x's what rounding took from both.
template <class Codes>
class ScaleResolver {
 public:
  using T = typename Codes::T;

  // `shared`: address of the CTA's shared memory.
  __device__ __forceinline__ ScaleResolver(const Params& p, uint32_t shared, int lane)
      : p(p), shared(shared), lane(lane) {
    nested_offset = p.scale_type == int(ScaleType::kNested) ? __ldg(p.nested_offset) : 0;
  }

  // Second-level scales of a lane's rows in a group: they may be requested before the stage is there.
  struct SecondLevel {
    float of[2];
  };
  __device__ __forceinline__ SecondLevel load_second_level(int slab, int chunk, int group) const {
    SecondLevel second;
    const int index =
        min(p.groups_in_chunk > 1 ? chunk * p.groups_in_chunk + group : chunk >> p.group_shift, p.groups - 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // Rows behind N are padding: any second-level scale that exists.
      const int row = min(slab * layout::kBlockRows + layout::scale_row(2 * lane + i), p.n - 1);
      second.of[i] = __ldg(p.nested_absmax + (int64_t{row} * p.groups + index) / kNestedBlock);
    }
    return second;
  }

  // A lane has two neighbouring values of a group. `at`: of a slab's group in the stage, counted in groups.
  __device__ __forceinline__ void resolve(uint32_t stage, int at, const SecondLevel& second) const {
    const int value = at * layout::kBlockRows + 2 * lane;
    const uint2 raw = load_two(stage + p.scales_at + value * p.scale_bytes, p.scale_bytes);
    float2 scale;
    if (p.scale_type == int(ScaleType::kNested)) {
      scale.x = multiply_then_add(load_shared_float(shared + p.nested_map_at + (raw.x & 255) * 4), second.of[0],
                                  nested_offset);
      scale.y = multiply_then_add(load_shared_float(shared + p.nested_map_at + (raw.x >> 8) * 4), second.of[1],
                                  nested_offset);
    } else {
      scale = floats(raw, p.scale_type);
    }
    const uint32_t to = stage + p.resolved_at + value * 2;
    const float2 stored{Codes::stored_scale(0, scale.x), Codes::stored_scale(1, scale.y)};
    const float2 rounded_scale = store_pair(to, stored);
    if constexpr (Codes::kTable) {
      store_pair(to + p.resolved_bytes, {stored.x - rounded_scale.x, stored.y - rounded_scale.y});
    } else {
      float2 zero{};
      if (p.zero_bytes != 0) {
        const uint2 stored = load_two(stage + p.zeros_at + value * p.zero_bytes, p.zero_bytes);
        if (p.zero_type == int(ZeroType::kInteger)) {
          zero = {float(stored.x & 255), float(stored.x >> 8)};
        } else {
          zero = floats(stored, p.scale_type);
        }
      }
      // Of the rounded scale where it is fused, so that code and zero point have the same.
      const float bias = float(p.bias_of_codes);
      const float2 fused{unscale<0>(rounded_scale.x), unscale<1>(rounded_scale.y)};
      zero = {Codes::stored_zero(zero.x + bias, fused.x), Codes::stored_zero(zero.y + bias, fused.y)};
      const float2 rounded = store_pair(to + p.resolved_bytes, zero);
      if (p.has_rest) {
        store_pair(to + 2 * p.resolved_bytes, {zero.x - rounded.x, zero.y - rounded.y});
        store_pair(to + 3 * p.resolved_bytes, {stored.x - rounded_scale.x, stored.y - rounded_scale.y});
      }
    }
  }

 private:
  const Params& p;
  uint32_t shared;
  int lane;
  float nested_offset;

  // Rounds to T; returns what was stored.
  __device__ __forceinline__ static float2 store_pair(uint32_t to, float2 v) {
    const uint32_t pair = as_bits(Pair<T>::of(v.x, v.y));
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(pair) : "memory");
    return unpack_pair<T>(pair);
  }

  __device__ __forceinline__ static uint2 load_two(uint32_t from, int bytes) {
    if (bytes == 2) return {load_shared_4(from), 0};
    if (bytes == 4) return load_shared_8(from);
    return {load_shared_2(from), 0};
  }

  // A scale from what it is stored as.
  template <int kRow>
  __device__ __forceinline__ static float unscale(float stored) {
    return stored * (1 / Codes::stored_scale(kRow, 1));
  }

  // Two neighbours of a type of scales.
  __device__ __forceinline__ static float2 floats(uint2 raw, int type) {
    if (type == int(ScaleType::kFp32)) return {__uint_as_float(raw.x), __uint_as_float(raw.y)};
    if (type == int(ScaleType::kBf16)) return unpack_pair<__nv_bfloat16>(raw.x);
    if (type == int(ScaleType::kFp16)) return unpack_pair<__half>(raw.x);
    return {byte_scale(raw.x & 255, type), byte_scale(raw.x >> 8, type)};
  }

  __device__ __forceinline__ static float byte_scale(uint32_t byte, int type) {
    if (type == int(ScaleType::kE4M4)) return e4m4_to_float(uint8_t(byte));
    if (type == int(ScaleType::kE4M3)) return e4m3_to_float(uint8_t(byte));  // times tensor_scale, at the end
    return e8m0_to_float(uint8_t(byte));
  }
};

}  // namespace cutlass_ext::cuda::wgmma
