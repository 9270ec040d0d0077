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
  kFp32,        // in the stage, as they are
  k16Bit,       // the same in the type of x
  k16BitZeros,  // the same, and zero points: integers or of x's type
  kNested,      // codes in the stage, decoded by each lane
  kResolved,    // every type: first converted to fp32 in a region of the warp, two rows a lane
};

constexpr bool has_zeros(ScaleSource source, bool integers) {
  return source == ScaleSource::k16BitZeros || (source == ScaleSource::kResolved && integers);
}
// Bytes of a scale in a stage, at most.
constexpr int scale_bytes_of(ScaleSource source) {
  return source == ScaleSource::kNested                                        ? 1
         : source == ScaleSource::k16Bit || source == ScaleSource::k16BitZeros ? 2
                                                                               : 4;
}

// The map of nested scales where each lane decodes its own: every entry eight times, so that the eight rows of a load
// fall on different banks.
constexpr int kLogMapEntryBytes = 5;
constexpr int kMapEntryBytes = 1 << kLogMapEntryBytes;

template <class C>
class Scales {
 public:
  using Codes = typename C::Codes;
  using T = typename C::T;
  static constexpr bool kResolve = C::kScales == ScaleSource::kResolved;
  static constexpr bool kNestedDirect = C::kScales == ScaleSource::kNested;
  static constexpr bool kZeros = has_zeros(C::kScales, !Codes::kTable);
  static constexpr int kGroupScales = C::kGroups * layout::kBlockRows;  // of a block
  static constexpr int kRows = 2 * C::kAtoms;                           // of a lane

  // Requests nothing from x or y: may run before the grid dependency.
  __device__ __forceinline__ void start(const Params& p, uint32_t window, int lane, int warp, int threads) {
    if constexpr (kResolve) resolved = window + p.resolved_at + warp * resolved_bytes(p.zero_bytes != 0);
    if constexpr (kNestedDirect) {
      nested_offset = *p.nested_offset;
      nested_lane = window | (lane >> 2) * 4;
      // Thread i: half of an entry's copies.
      for (int i = warp * layout::kLanes + lane; i < 2 * kNestedMapSize; i += threads) {
        const uint32_t v = __float_as_uint(p.nested_map[i >> 1]);
        store_shared_16(window + C::kMapAt + i * (kMapEntryBytes / 2), make_uint4(v, v, v, v));
      }
    } else if constexpr (kResolve) {
      nested_map = window + p.nested_map_at;
      if (p.scale_type == int(ScaleType::kNested)) {
        nested_offset = *p.nested_offset;
        for (int i = warp * layout::kLanes + lane; i < kNestedMapSize; i += threads) {
          store_shared_float(nested_map + i * 4, p.nested_map[i]);
        }
      }
    }
  }

  __device__ __forceinline__ void start_unit(const Params& p, uint32_t unit, int block, int lane) {
    position = (lane >> 2) * 8 + unit % C::kUnitsPerSlab * kRows;
    if constexpr (kNestedDirect) {
      first_row = unit * C::kRows + (lane >> 2);
      refresh(p, block >> p.group_shift);
    }
    if constexpr (kResolve) {
      if (p.scale_type != int(ScaleType::kNested)) return;
      // The second-level scales of the first groups are there when they are needed.
      const int slab = unit / C::kUnitsPerSlab;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        pair_row[i] = slab * layout::kBlockRows + layout::scale_row(2 * lane + i);
        pair_at[i] = nested_index(p, pair_row[i], (block >> p.group_shift) * C::kGroups);
        pair_absmax[i] = __ldg(p.nested_absmax + pair_at[i]);
      }
    }
  }

  // Prepares the scales and zeros of the stage at `raw`.
  __device__ __forceinline__ void resolve(const Params& p, uint32_t raw, int block, int lane) {
    if constexpr (kNestedDirect) {
      const int group = block >> p.group_shift;
      if (group >= nested_until) refresh(p, group);
    }
    if constexpr (kResolve) {
#pragma unroll
      for (int group = 0; group < C::kGroups; ++group) {
        const int at = group * layout::kBlockRows + 2 * lane;
        const float2 scale =
            p.scale_type == int(ScaleType::kNested)
                ? nested_pair(p, raw + C::kScalesAt + at, (block >> p.group_shift) * C::kGroups + group)
                : scale_pair(p, raw + C::kScalesAt + at * p.scale_bytes);
        store_shared_float2(resolved + at * 4, scale);
        if (kZeros && p.zero_bytes != 0) {
          const uint32_t from = raw + C::kZerosAt + at * p.zero_bytes;
          store_shared_float2(resolved + (kGroupScales + at) * 4, zero_pair(p, from));
        }
      }
      __syncwarp();
    }
  }

  // The scales of one group of a lane. Those of 16 bits are converted when they are used, which saves registers.
  struct Group {
    static constexpr bool k16 = C::kScales == ScaleSource::k16Bit || C::kScales == ScaleSource::k16BitZeros;
    static constexpr int kWords = k16 ? C::kAtoms : kRows;
    uint32_t words[kWords];
  };

  __device__ __forceinline__ Group load(uint32_t raw, int group) const {
    Group loaded;
    if constexpr (kNestedDirect) {
      uint32_t codes[(kRows + 3) / 4];
      load_bytes(raw + C::kScalesAt + position, codes);
#pragma unroll
      for (int i = 0; i < kRows; ++i) loaded.words[i] = __float_as_uint(nested_scale(codes[i / 4], i));
    } else {
      const int at = group * layout::kBlockRows + position;
      const uint32_t from = kResolve ? resolved + at * 4 : raw + C::kScalesAt + at * (Group::k16 ? 2 : 4);
      load_words(from, loaded.words);
    }
    return loaded;
  }

  // Of an atom's rows g and g + 8.
  __device__ __forceinline__ float2 scale_of(const Group& group, int atom) const {
    float2 pair;
    if constexpr (Group::k16) {
      pair = unpack_pair<T>(group.words[atom]);
    } else {
      pair = {__uint_as_float(group.words[2 * atom]), __uint_as_float(group.words[2 * atom + 1])};
    }
    if constexpr (Codes::kHighRows != 1) pair.y *= 1 / Codes::kHighRows;
    return pair;
  }

  // The zero points of one group of a lane.
  struct Zeros {
    uint32_t words[kResolve ? kRows : C::kAtoms];
  };

  __device__ __forceinline__ Zeros load_zeros(const Params& p, uint32_t raw, int group) const {
    Zeros loaded;
    const int at = group * layout::kBlockRows + position;
    if constexpr (kResolve) {
      load_words(resolved + (kGroupScales + at) * 4, loaded.words);
    } else if (p.zero_type == int(ZeroType::kInteger)) {
      uint32_t bytes[(kRows + 3) / 4];
      load_bytes(raw + C::kZerosAt + at, bytes);
#pragma unroll
      for (int i = 0; i < (kRows + 3) / 4; ++i) loaded.words[i] = bytes[i];
    } else {
      load_words(raw + C::kZerosAt + at * 2, loaded.words);
    }
    return loaded;
  }

  // What the start of an atom's rows g and g + 8 is multiplied with: codes.cuh.
  __device__ __forceinline__ float2 start_factor(const Params& p, const Zeros& zeros, int atom) const {
    float2 zero;
    if constexpr (kResolve) {  // integers: 2^23 + z, as below
      zero = {__uint_as_float(zeros.words[2 * atom]), __uint_as_float(zeros.words[2 * atom + 1])};
    } else if (p.zero_type == int(ZeroType::kInteger)) {
      zero = bytes_above_2_to_23(zeros.words[atom / 2], 2 * (atom % 2));
    } else {
      zero = unpack_pair<T>(zeros.words[atom]);
    }
    return {zero.x + p.zero_offset_low, zero.y * Codes::kHighRows + p.zero_offset_high};
  }

  static constexpr __host__ __device__ int resolved_bytes(bool zeros) { return kGroupScales * 4 * (zeros ? 2 : 1); }

 private:
  int position;  // of the lane's first scale in a group
  uint32_t resolved, nested_map;
  uint32_t nested_lane;  // window and offset in an entry
  float nested_offset;
  // Decoded by each lane: its rows are every eighth from the first; their second-level scales hold up to a group.
  int first_row;
  float nested_absmax[kRows];
  int nested_until;
  // Decoded by pairs.
  int pair_row[2];
  int pair_at[2];  // index of pair_absmax[]
  float pair_absmax[2];

  // Of the lane's row `row`, whose code is byte `row` % 4.
  __device__ __forceinline__ float nested_scale(uint32_t word, int row) const {
    const int shift = kLogMapEntryBytes - 8 * (row % 4);  // the code to the place of an entry's address
    const uint32_t entry = (shift > 0 ? word << shift : word >> -shift) & 255 * kMapEntryBytes;
    const float value = load_shared_float((entry | nested_lane) + C::kMapAt);
    return fmaf(value, nested_absmax[row], nested_offset);
  }

  template <int kWords>
  __device__ __forceinline__ static void load_words(uint32_t from, uint32_t (&words)[kWords]) {
    if constexpr (kWords == 1) {
      words[0] = load_shared_4(from);
    } else if constexpr (kWords == 2) {
      const uint2 v = load_shared_8(from);
      words[0] = v.x, words[1] = v.y;
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 v = load_shared_16(from + i * 4);
        words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
      }
    }
  }

  // A byte for each of the lane's rows.
  template <int kWords>
  __device__ __forceinline__ static void load_bytes(uint32_t from, uint32_t (&words)[kWords]) {
    if constexpr (kRows == 2) {
      words[0] = load_shared_2(from);
    } else {
      load_words(from, words);
    }
  }

  // 2^23 and two bytes of a word, the first and the next, which are its last mantissa bits then.
  __device__ __forceinline__ static float2 bytes_above_2_to_23(uint32_t word, int first) {
    return {__uint_as_float(__byte_perm(word, 0x4B000000u, 0x7650 + first)),
            __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7651 + first))};
  }

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
    return bytes_above_2_to_23(load_shared_2(from), 0);
  }

  // Rows and groups behind the weight are padding: any that exist.
  __device__ __forceinline__ static int nested_index(const Params& p, int row, int group) {
    return int((int64_t(min(row, p.n - 1)) * p.groups + min(group, p.groups - 1)) / kNestedBlock);
  }

  // Seldom called: a second-level scale covers 256 groups of a row.
  __device__ __forceinline__ void refresh(const Params& p, int group) {
    nested_until = INT32_MAX;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = min(first_row + 8 * i, p.n - 1);
      const int at = nested_index(p, row, group);
      nested_absmax[i] = __ldg(p.nested_absmax + at);
      // Where the padding repeats a group this lies behind K.
      const int64_t next = (int64_t(at) + 1) * kNestedBlock - int64_t(row) * p.groups;
      nested_until = min(nested_until, int(min(next, int64_t(INT32_MAX))));
    }
  }

  __device__ __forceinline__ float2 nested_pair(const Params& p, uint32_t from, int group) {
    const uint32_t pair = load_shared_2(from);
    float scale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = nested_index(p, pair_row[i], group);
      if (at != pair_at[i]) {
        pair_at[i] = at;
        pair_absmax[i] = __ldg(p.nested_absmax + at);
      }
      const uint32_t code = i == 0 ? pair & 255 : pair >> 8;
      scale[i] = multiply_then_add(load_shared_float(nested_map + code * 4), pair_absmax[i], nested_offset);
    }
    return {scale[0], scale[1]};
  }
};

}  // namespace cutlass_ext::cuda::stream
