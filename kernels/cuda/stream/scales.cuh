// Scales and zero points in the stream kernel. A lane needs those of the rows g, g + 8, .. of its unit, which lie side
// by side (layout::scale_position).
#pragma once

#include <type_traits>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/stream/codes.cuh"
#include "kernels/cuda/stream/params.hpp"
#include "kernels/decode.hpp"

namespace cutlass_ext::cuda::stream {

// Where the main loop finds them.
enum class ScaleSource {
  kFp32,      // in the stage, as they are
  k16Bit,     // the same in the type of x
  kResolved,  // every type, and zero points: first converted to fp32 in a region of the warp, two rows a lane
};

template <class C>
class Scales {
 public:
  using Codes = typename C::Codes;
  static constexpr bool kResolve = C::kScales == ScaleSource::kResolved;
  static constexpr bool kZeros = kResolve && !Codes::kTable;
  static constexpr int kGroupScales = C::kGroups * layout::kBlockRows;  // of a block

  __device__ __forceinline__ void start(const Params& p, uint32_t window, int lane, int warp) {
    if constexpr (kResolve) {
      resolved = window + p.resolved_at + warp * resolved_bytes(p.zero_bytes != 0);
      nested_map = window + p.nested_map_at;
      if (p.scale_type == int(ScaleType::kNested)) {
        nested_offset = *p.nested_offset;
        for (int i = threadIdx.x; i < kNestedMapSize; i += blockDim.x) {
          store_shared_float(nested_map + i * 4, p.nested_map[i]);
        }
      }
    }
  }

  // Nested: requests the second-level scales of the unit's first groups, which are there when they are needed.
  __device__ __forceinline__ void start_unit(const Params& p, int unit, int block, int lane) {
    position = (lane >> 2) * 8 + unit % C::kUnitsPerSlab * (2 * C::kAtoms);
    if constexpr (kResolve) {
      if (p.scale_type != int(ScaleType::kNested)) return;
      const int slab = unit / C::kUnitsPerSlab;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // Rows behind N are padding: any group that exists.
        nested_row[i] = min(slab * layout::kBlockRows + layout::scale_row(2 * lane + i), p.n - 1);
        nested_at[i] = nested_index(p, i, (block >> p.group_shift) * C::kGroups);
        nested[i] = __ldg(p.nested_absmax + nested_at[i]);
      }
    }
  }

  // Converts the scales and zeros of a stage, which stand at `raw`.
  __device__ __forceinline__ void resolve(const Params& p, uint32_t raw, int block, int lane) {
    if constexpr (kResolve) {
#pragma unroll
      for (int group = 0; group < C::kGroups; ++group) {
        const int at = group * layout::kBlockRows + 2 * lane;
        const float2 scale = p.scale_type == int(ScaleType::kNested)
                                 ? nested_pair(p, raw + at, (block >> p.group_shift) * C::kGroups + group)
                                 : scale_pair(p, raw + at * p.scale_bytes);
        store_shared_float2(resolved + at * 4, scale);
        if (kZeros && p.zero_bytes != 0) {
          const uint32_t from = raw + p.group_scale_bytes + at * p.zero_bytes;
          store_shared_float2(resolved + (kGroupScales + at) * 4, zero_pair(p, from));
        }
      }
      __syncwarp();
    }
  }

  // The scales of one group of a lane, as they are stored: those of 16 bits are converted when they are used, which
  // saves registers.
  struct Group {
    static constexpr int kWords = C::kScales == ScaleSource::k16Bit ? C::kAtoms : 2 * C::kAtoms;
    uint32_t words[kWords];

    // Of an atom's rows g and g + 8.
    __device__ __forceinline__ float2 of(int atom) const {
      float2 pair;
      if constexpr (C::kScales == ScaleSource::k16Bit) {
        pair = unpack_pair<typename C::T>(words[atom]);
      } else {
        pair = {__uint_as_float(words[2 * atom]), __uint_as_float(words[2 * atom + 1])};
      }
      if constexpr (Codes::kHighRows != 1) pair.y *= 1 / Codes::kHighRows;
      return pair;
    }
  };

  __device__ __forceinline__ Group load(uint32_t raw, int group) const {
    const int at = group * layout::kBlockRows + position;
    const uint32_t from = C::kScales == ScaleSource::k16Bit ? raw + at * 2 : (kResolve ? resolved : raw) + at * 4;
    Group loaded;
    if constexpr (Group::kWords == 1) {
      loaded.words[0] = load_shared_4(from);
    } else if constexpr (Group::kWords == 2) {
      const uint2 v = load_shared_8(from);
      loaded.words[0] = v.x, loaded.words[1] = v.y;
    } else {
#pragma unroll
      for (int i = 0; i < Group::kWords; i += 4) {
        const uint4 v = load_shared_16(from + i * 4);
        loaded.words[i] = v.x, loaded.words[i + 1] = v.y, loaded.words[i + 2] = v.z, loaded.words[i + 3] = v.w;
      }
    }
    return loaded;
  }

  // Zero points of an atom's rows g and g + 8, as multiples of the accumulators' start.
  __device__ __forceinline__ float2 load_zero(const Params& p, int group, int atom) const {
    const int at = kGroupScales + group * layout::kBlockRows + position + 2 * atom;
    const float2 zero = load_shared_float2(resolved + at * 4);
    return {zero.x * p.zero_low, zero.y * p.zero_high};
  }

  static constexpr __host__ __device__ int resolved_bytes(bool zeros) { return kGroupScales * 4 * (zeros ? 2 : 1); }

 private:
  int position;  // of the lane's first scale in a group
  uint32_t resolved, nested_map;
  int nested_row[2];  // the rows that this lane converts
  int nested_at[2];   // index of nested[]
  float nested[2];
  float nested_offset;

  __device__ __forceinline__ static float byte_scale(const Params& p, uint32_t byte) {
    if (p.scale_type == int(ScaleType::kE4M4)) return e4m4_to_float(uint8_t(byte));
    if (p.scale_type == int(ScaleType::kE4M3)) return e4m3_to_float(uint8_t(byte));  // times tensor_scale, at the end
    return e8m0_to_float(uint8_t(byte));
  }

  // Two neighbours in one of the types of scales; floating-point zeros have them too.
  __device__ __forceinline__ static float2 scale_pair(const Params& p, uint32_t from) {
    if (p.scale_bytes == 4) return load_shared_float2(from);
    if (p.scale_bytes == 2) {
      const uint32_t pair = load_shared_4(from);
      return p.scale_type == int(ScaleType::kFp16) ? unpack_pair<__half>(pair) : unpack_pair<__nv_bfloat16>(pair);
    }
    const uint32_t pair = load_shared_2(from);
    return {byte_scale(p, pair & 255), byte_scale(p, pair >> 8)};
  }

  __device__ __forceinline__ static float2 zero_pair(const Params& p, uint32_t from) {
    if (p.zero_type != int(ZeroType::kInteger)) return scale_pair(p, from);
    const uint32_t pair = load_shared_2(from);
    return {float(pair & 255), float(pair >> 8)};
  }

  __device__ __forceinline__ int nested_index(const Params& p, int i, int group) const {
    return int((int64_t(nested_row[i]) * p.groups + min(group, p.groups - 1)) / kNestedBlock);
  }

  __device__ __forceinline__ float2 nested_pair(const Params& p, uint32_t from, int group) {
    const uint32_t pair = load_shared_2(from);
    float scale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = nested_index(p, i, group);
      if (at != nested_at[i]) {  // seldom: a second-level scale covers 256 groups of a row
        nested_at[i] = at;
        nested[i] = __ldg(p.nested_absmax + at);
      }
      const uint32_t code = i == 0 ? pair & 255 : pair >> 8;
      scale[i] = multiply_then_add(load_shared_float(nested_map + code * 4), nested[i], nested_offset);
    }
    return {scale[0], scale[1]};
  }
};

}  // namespace cutlass_ext::cuda::stream
