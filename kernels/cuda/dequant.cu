// Packed or canonical weight -> row-major matrix, each value computed in fp32 as kernels/cpu/dequant.hpp computes it
// and rounded once.
//
// A block of threads takes 64 rows x 256 k: codes to shared memory as they lie, scales to shared memory decoded. Then
// every thread makes 16 bytes of the output at a time: 8 codes (4 for fp32) of a row, k ascending. A warp writes 512
// consecutive bytes. For packed codes these are one pair from each of four (two) neighbouring lanes of an atom, whose
// words also hold the chunk eight rows further down.
//
// Where rows of the output do not all start at a multiple of 16 bytes, chunks start where such a multiple is: each
// row's are shifted by up to 7 k (`kShift`). The last of a tile's reaches into the next tile, the first k of a row and
// what a row's last chunk lacks are stored one by one.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

#include <type_traits>

#include "kernels/cuda/canonical_tile.hpp"
#include "kernels/cuda/codebook.hpp"
#include "kernels/cuda/device.hpp"
#include "kernels/cuda/launch.hpp"
#include "kernels/cuda/unroll.hpp"
#include "kernels/decode.hpp"
#include "kernels/instance.hpp"

namespace cutlass_ext::cuda {
namespace {

using layout::CodeOrder;

constexpr int kMinGroup = 16;
constexpr int kMinFlatGroup = 32;
constexpr int kMaxSlots = kTileK / kMinGroup;  // groups of a row that begin in a tile, at most
constexpr int kMaxShift = 7;                   // k by which a row's chunks begin later than its tiles
constexpr int kNoShift = 62;                   // one group: no k reaches the next

struct DequantParameters {
  Weight weight;
  CodebookParameter codebook;
  void* out;
  int64_t ld;
  int group_shift;
  int unit_shift;         // of k in units of kMinGroup
  int row_groups;         // of a row
  int64_t groups;         // of a row; of the weight where scales are flat
  int64_t packed_groups;  // of a slab
  CodeRows rows;
  int64_t blocks;  // along k
  uint32_t tiles;  // along k
};

// K below 2^36.
__device__ __forceinline__ unsigned in_units(int64_t k) {
  return static_cast<unsigned>(static_cast<uint64_t>(k) / kMinGroup);
}

// The codes of a tile as they lie in memory, from which a thread reads chunks of a fixed place in the rows. What they
// stand for is looked up in shared memory: `extract` gives offsets into a table (or two: first and second codes of a
// pair, so that one shift brings both into place), every entry of which has a bank of its own. 8-bit codes: the codes.
template <int kBits>
constexpr bool kTable = kBits <= 5;  // integers of 4 bits too: a lookup costs less than a conversion
constexpr int kTableWords = 32;      // of each

template <int kBits, CodeOrder kOrder, bool kPacked, int kChunk, bool kShift>
class TileCodes;

template <int kBits, CodeOrder kOrder, int kChunk, bool kShift>
class TileCodes<kBits, kOrder, /*kPacked=*/true, kChunk, kShift> {
  // Blocks lie 16 bytes further apart than in memory: threads of a warp read one row of four blocks, which would lie in
  // the same banks.
  static constexpr int kPitch = layout::block_bytes(kBits) + 16;
  static constexpr int kPlaneCount = layout::planes_of(kBits).count;
  static constexpr int kBlocks = kTileBlocks + kShift;  // shifted chunks reach into the next tile
  static constexpr int kPairs = kChunk / 2 + kShift;    // that a chunk touches
  static constexpr int kQuad = 4;                       // lanes that hold a row's pairs, eight k of them

 public:
  static constexpr int kBytes = kBlocks * kPitch;

  static __device__ void load(uint8_t* tile, const DequantParameters& p, int64_t slab, int64_t tile_k) {
    constexpr int kPieces = layout::block_bytes(kBits) / 16;
    const int64_t first = tile_k * kTileBlocks;
    const auto* from =
        reinterpret_cast<const uint4*>(p.weight.codes + (slab * p.blocks + first) * layout::block_bytes(kBits));
    const int count = static_cast<int>(min(int64_t{kBlocks}, p.blocks - first)) * kPieces;
    // A whole tile's number of pieces is known: unrolled, addresses are constants apart.
#pragma unroll
    for (int at = 0; at < kBlocks * kPieces; at += kTileThreads) {
      const int i = at + static_cast<int>(threadIdx.x);
      // Asynchronous, so that scales are decoded while codes are on their way.
      if (i < count) __pipeline_memcpy_async(tile + i / kPieces * kPitch + i % kPieces * 16, from + i, 16);
    }
    __pipeline_commit();
  }

  // What rows g and g + 8 of an atom share: the lanes' words that hold the chunk's pairs, turned so that the first code
  // of row g is in its place.
  struct Words {
    uint32_t words[kPlaneCount][kPairs];
  };

  // Chunks at `k` of rows g, g + 8, g + 16, ..
  __device__ TileCodes(const uint8_t* tile, int g, int k, uint32_t /*bias*/) : tile_(tile), pair_(k % 8 / 2) {
    static_assert(rows_share_words());
    unroll<kPlaneCount>([&](auto plane) { octets_[0].set(g, k / 8 * 8, plane); });
    if (kShift) unroll<kPlaneCount>([&](auto plane) { octets_[kShift].set(g, k / 8 * 8 + 8, plane); });
  }

  // Of an atom; all numbers are constants after unrolling.
  __device__ Words load(int atom) const {
    Words words;
    unroll<kPlaneCount>([&](auto plane) {
      constexpr int kPlane = decltype(plane)::value;
      // Neighbouring lanes lie one piece apart.
      constexpr int kLaneBytes = layout::plane_address({1, 0, 0}, kBits, kPlane, kOrder).byte -
                                 layout::plane_address({0, 0, 0}, kBits, kPlane, kOrder).byte;
      const uint8_t* from = tile_ + atom * layout::atom_bytes(kBits);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        // Without kShift pair_ is 0, or 2 for fp32.
        const int lane = kShift ? (pair_ + i) % kQuad : pair_ + i;
        const bool next = kShift && pair_ + i >= kQuad;
        const int byte = next ? octets_[kShift].byte[kPlane] : octets_[0].byte[kPlane];
        const int turn = next ? octets_[kShift].turn[kPlane] : octets_[0].turn[kPlane];
        const uint32_t word = *reinterpret_cast<const uint32_t*>(from + byte + lane * kLaneBytes);
        words.words[kPlane][i] = __funnelshift_r(word, word, turn);
      }
    });
    return words;
  }

  // Codes of row g (half 0) or g + 8 (half 1); kOdd: the chunk begins with the second code of a pair.
  template <bool kOdd>
  __device__ void extract(const Words& words, int half, uint32_t (&offsets)[kChunk]) const {
    static_assert(kShift || !kOdd);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) offsets[e] = 0;
    unroll<kPlaneCount>([&](auto plane) {
      constexpr int kPlane = decltype(plane)::value;
      constexpr uint32_t kMask = (1u << layout::planes_of(kBits).bits[kPlane]) - 1;
      constexpr int kFirst = place(kPlane, 0), kSecond = place(kPlane, 1);
      constexpr int kSecondFrom = kFirst + value_distance(1, kPlane);
      const int from_half = half == 0 ? 0 : value_distance(2, kPlane);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const uint32_t word = words.words[kPlane][i];
        const int first = 2 * i - kOdd, second = first + 1;
        if (first >= 0 && first < kChunk) offsets[first] |= word >> from_half & kMask << kFirst;
        if (second < kChunk) {
          const int down = kSecondFrom + from_half - kSecond;
          offsets[second] |= word >> down & kMask << kSecond;
        }
      }
    });
  }

  static constexpr int kTables = kBits <= 3 ? 2 : 1;
  // Where the table for the first (second) codes of pairs has a code's value, in words.
  static constexpr int table_word(int code, int second) {
    int offset = 0;
    for (int plane = 0, low = 0; plane < kPlaneCount; low += layout::planes_of(kBits).bits[plane++]) {
      const int field = code >> low & ((1 << layout::planes_of(kBits).bits[plane]) - 1);
      offset |= field << place(plane, second);
    }
    return offset / 4;
  }

 private:
  // Bits of the offset that a plane's field goes to. With few bits the second code stays where it lies behind the
  // first, and its table is spread out; every entry has a bank of its own.
  static constexpr int place(int plane, int second) {
    if (!kTable<kBits>) return 0;
    if (kBits == 2) return second == 0 ? 2 : 4;
    if (kBits == 3) return plane == 0 ? (second == 0 ? 2 : 4) : (second == 0 ? 5 : 6);
    return plane == 0 ? 2 : 6;
  }
  // Bits between a lane's code and the one `values` further: 1, the second of the pair; 2, the same k of row g + 8.
  static constexpr int value_distance(int values, int plane) {
    const layout::BitAddress from = layout::plane_address({0, 0, 0}, kBits, plane, kOrder);
    const layout::BitAddress to = layout::plane_address({0, 0, values}, kBits, plane, kOrder);
    return (to.byte - from.byte) * 8 + to.shift - from.shift;
  }
  static constexpr layout::BitAddress address(int row, int k, int plane) {
    return layout::plane_address(layout::fragment_of(row, k % layout::kBlockK), kBits, plane, kOrder);
  }
  // Rows g and g + 8 are in the same words of a lane.
  static constexpr bool rows_share_words() {
    for (int k = 0; k < layout::kBlockK; ++k) {
      for (int plane = 0; plane < kPlaneCount; ++plane) {
        if (address(0, k, plane).byte / 4 != address(8, k, plane).byte / 4) return false;
      }
    }
    return true;
  }

  // Eight k of a row, from a multiple of eight: one pair of each lane of a quad.
  struct Octet {
    int byte[kPlaneCount];  // of the first lane's 32-bit word, in the tile's first atom
    int turn[kPlaneCount];

    __device__ void set(int g, int k, int plane) {
      const layout::BitAddress first = address(g, k, plane);
      byte[plane] = k / layout::kBlockK * kPitch + first.byte / 4 * 4;
      turn[plane] = first.byte % 4 * 8 + first.shift - place(plane, 0);
    }
  };

  const uint8_t* tile_;
  int pair_;  // the chunk's first, in its octet
  Octet octets_[1 + kShift];
};

template <int kBits, CodeOrder kOrder, int kChunk, bool kShift>
class TileCodes<kBits, kOrder, /*kPacked=*/false, kChunk, kShift> {
  using Tile = CanonicalTile<kBits>;
  static constexpr int kPlace = kTable<kBits> ? 2 : 0;  // offsets of floats

 public:
  static constexpr int kBytes = Tile::kBytes;

  static __device__ void load(uint8_t* tile, const DequantParameters& p, int64_t slab, int64_t tile_k) {
    const int64_t alignment = reinterpret_cast<int64_t>(p.weight.codes) | p.rows.bytes;
    if (alignment % 16 == 0) {
      Tile::template load<uint4>(tile, p.weight.codes, p.rows, slab, tile_k);
    } else if (alignment % 4 == 0) {
      Tile::template load<uint32_t>(tile, p.weight.codes, p.rows, slab, tile_k);
    } else {
      Tile::template load<uint8_t>(tile, p.weight.codes, p.rows, slab, tile_k);
    }
    if (kShift) Tile::load_beyond(tile, p.weight.codes, p.rows, slab, tile_k);
  }

  __device__ TileCodes(const uint8_t* tile, int g, int k, uint32_t bias)
      : words_(tile + g * Tile::kPitch + k * kBits / 32 * 4), shift_(k * kBits % 32), flip_(bias << kPlace) {}

  struct Words {
    uint64_t bits[2];
  };
  __device__ Words load(int atom) const {
    Words words;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto* from =
          reinterpret_cast<const uint32_t*>(words_ + (atom * layout::kAtomRows + 8 * half) * Tile::kPitch);
      // A chunk has up to 64 bits; shifted, it may begin anywhere in its first word.
      const uint32_t third = kShift && kChunk * kBits > 32 ? from[2] : 0;
      words.bits[half] = __funnelshift_r(from[0], from[1], shift_) | uint64_t{__funnelshift_r(from[1], third, shift_)}
                                                                         << 32;
    }
    return words;
  }
  template <bool kOdd>
  __device__ void extract(const Words& words, int half, uint32_t (&offsets)[kChunk]) const {
    const uint64_t bits = words.bits[half];
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      const uint32_t moved = static_cast<uint32_t>(e * kBits < kPlace ? bits << kPlace : bits >> (e * kBits - kPlace));
      offsets[e] = (moved & ((1u << kBits) - 1) << kPlace) ^ flip_;
    }
  }

  static constexpr int kTables = 1;
  static constexpr int table_word(int code, int) { return code; }

 private:
  const uint8_t* words_;
  int shift_;
  uint32_t flip_;  // signed codes become unsigned, as in the packed layout
};

// The decoded scales (zeros) of a tile, [row][slot]: slots count groups from the one that the tile's row begins in.
struct TileScales {
  float scales[layout::kBlockRows][kMaxSlots + 1];
  float zeros[layout::kBlockRows][kMaxSlots + 1];
};

// Of one scale type. A thread has up to five values: it loads two before it decodes the first.
template <ScaleType kType, bool kPacked, bool kZeros, bool kFlat, bool kShift>
__device__ __forceinline__ void decode_scales(TileScales& tile, const DequantParameters& p, int64_t slab,
                                              int64_t first_k) {
  Weight w = p.weight;
  w.scale_type = kType;
  const float factor = kType == ScaleType::kE4M3 ? tensor_scale(w) : 1.0f;
  const float offset = kType == ScaleType::kNested ? nested_offset(w) : 0.0f;
  w.tensor_scale = &factor;  // loaded once: for all the compiler knows, shared memory is written there
  w.nested_offset = &offset;
  constexpr int kReach = kTileK + (kShift ? kMaxShift : 0);
  const int64_t last_k = min(first_k + kReach, w.k) - 1;
  // Groups of a row in 32 bits: k in units of the smallest group. Flat groups may begin anywhere in a tile.
  const unsigned row_group = in_units(first_k) >> p.unit_shift;
  const int count = kFlat ? (static_cast<int>(w.group_size) + kReach - 2 >> p.group_shift) + 1
                          : static_cast<int>((in_units(last_k) >> p.unit_shift) - row_group) + 1;
  // A thread stays in its row; neighbours are neighbours in memory.
  constexpr int kRowThreads = kTileThreads / layout::kBlockRows;
  const int row = kPacked ? layout::scale_row(threadIdx.x % layout::kBlockRows) : threadIdx.x / kRowThreads;
  const int64_t n = slab * layout::kBlockRows + row;
  const int64_t first_group = kFlat ? (n * w.k + first_k) >> p.group_shift : int64_t{row_group};
  const int64_t first_number = kFlat ? first_group : n * p.groups + first_group;
  const int64_t first_index =
      kPacked && !kFlat ? (slab * p.packed_groups + first_group) * layout::kBlockRows + layout::scale_position(row)
                        : first_number;
  constexpr int kStep = kPacked && !kFlat ? layout::kBlockRows : 1;
  // Of padding and of what lies beyond the last group: 0.
  const int left = kFlat ? static_cast<int>(min(p.groups - first_group, int64_t{count}))
                         : p.row_groups - static_cast<int>(row_group);
  const int valid = n < w.n ? min(left, count) : 0;
  constexpr int kAtOnce = kType == ScaleType::kNested ? 1 : 2;
#pragma unroll 1
  for (int first = kPacked ? threadIdx.x / layout::kBlockRows : threadIdx.x % kRowThreads; first < count;
       first += kAtOnce * kRowThreads) {
    float scales[kAtOnce], zeros[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int slot = first + i * kRowThreads;
      scales[i] = zeros[i] = 0;
      if (slot < valid) {
        const int64_t index = first_index + slot * kStep;
        scales[i] = decode_scale(w, index, first_number + slot);
        if (kZeros && w.zero_type != ZeroType::kNone) zeros[i] = decode_zero(w, index);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int slot = first + i * kRowThreads;
      if (slot < count) {
        tile.scales[row][slot] = scales[i];
        if (kZeros) tile.zeros[row][slot] = zeros[i];
      }
    }
  }
}

template <bool kPacked, bool kZeros, bool kFlat, bool kShift>
__device__ __forceinline__ void decode_scales(TileScales& tile, const DequantParameters& p, int64_t slab,
                                              int64_t first_k) {
  const auto decode = [&](auto type) {
    decode_scales<decltype(type)::value, kPacked, kZeros, kFlat, kShift>(tile, p, slab, first_k);
  };
  switch (p.weight.scale_type) {
    case ScaleType::kFp32:
      return decode(std::integral_constant<ScaleType, ScaleType::kFp32>{});
    case ScaleType::kFp16:
      return decode(std::integral_constant<ScaleType, ScaleType::kFp16>{});
    case ScaleType::kBf16:
      return decode(std::integral_constant<ScaleType, ScaleType::kBf16>{});
    default:
      break;
  }
  if constexpr (!kZeros) {  // only codebooks have the others: formats_as_compiled
    switch (p.weight.scale_type) {
      case ScaleType::kE4M4:
        return decode(std::integral_constant<ScaleType, ScaleType::kE4M4>{});
      case ScaleType::kE4M3:
        return decode(std::integral_constant<ScaleType, ScaleType::kE4M3>{});
      case ScaleType::kE8M0:
        return decode(std::integral_constant<ScaleType, ScaleType::kE8M0>{});
      default:
        return decode(std::integral_constant<ScaleType, ScaleType::kNested>{});
    }
  }
}

constexpr bool formats_as_compiled() {
  for (const Format& format : kFormats) {
    if (format.encoding != Encoding::kCodebook && format.scale_types >> (static_cast<int>(ScaleType::kBf16) + 1) != 0) {
      return false;
    }
    // Flat groups belong to codebooks, and shifted tiles have no room for more of them.
    if (format.flat_blocks && format.encoding != Encoding::kCodebook) return false;
    for (const int* g = format.group_sizes; format.flat_blocks && g != nullptr && *g != 0; ++g) {
      if (*g < kMinFlatGroup) return false;
    }
  }
  return true;
}
static_assert(formats_as_compiled());

// An assignment of uint4 may become four stores.
__device__ __forceinline__ void store_16_bytes(void* to, uint4 value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w));
}

__device__ uint32_t round_pair(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ uint32_t round_pair(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <class Out, int kChunk>
__device__ uint4 round_chunk(const float (&values)[kChunk]) {
  if constexpr (sizeof(Out) == 4) {
    return {__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
            __float_as_uint(values[3])};
  } else {
    return {round_pair(values[0], values[1], Out{}), round_pair(values[2], values[3], Out{}),
            round_pair(values[4], values[5], Out{}), round_pair(values[6], values[7], Out{})};
  }
}

// A chunk in each of rows g, g + 8, .., g + 56 of the tile.
template <int kBits, CodeOrder kOrder, bool kPacked, bool kFlat, bool kShift, class Out>
struct ChunkWriter {
  static constexpr int kChunk = 16 / sizeof(Out);
  static constexpr bool kInteger = kOrder == CodeOrder::kHalves;
  using Codes = TileCodes<kBits, kOrder, kPacked, kChunk, kShift>;
  using Tables = float[Codes::kTables][kTableWords];

  const DequantParameters& p;
  const uint8_t* tile;
  const TileScales& decoded;
  const Tables& tables;
  int64_t slab, first_k;

  // From `k` of the tile, `count` values; all of them: the address is a multiple of 16.
  template <bool kOdd>
  __device__ __forceinline__ void write(int g, int k, int count) const {
    const Weight& w = p.weight;
    const Codes codes_of_rows(tile, g, k, static_cast<uint32_t>(w.bias));
    const int left_rows = static_cast<int>(min(w.n - slab * layout::kBlockRows, int64_t{layout::kBlockRows}));
    const unsigned in_group = static_cast<unsigned>(w.group_size) - 1;
    // 2^23 + code is a float whose low bits are the code.
    const float magic = 8388608.0f + static_cast<float>(w.bias);
    int slot = static_cast<int>((in_units(first_k + k) >> p.unit_shift) - (in_units(first_k) >> p.unit_shift));
    int group_left = kChunk;  // codes of the chunk in the first one's group
    if (kShift && !kFlat && p.group_shift != kNoShift) {
      group_left = w.group_size - ((first_k + k) & (w.group_size - 1)) < kChunk
                       ? static_cast<int>(in_group + 1 - (static_cast<unsigned>(first_k + k) & in_group))
                       : kChunk;
    }
    // Flat groups are powers of two: of the number of a weight its low bits are enough.
    unsigned row_start = static_cast<unsigned>(slab * layout::kBlockRows + g) * static_cast<unsigned>(w.k) +
                         static_cast<unsigned>(first_k);
    const unsigned row_step = 8 * static_cast<unsigned>(w.k);
    typename Codes::Words words;
    Out* out = static_cast<Out*>(p.out) + (slab * layout::kBlockRows + g) * p.ld + first_k + k;
    // Shifted, one pair of rows after the other, for the registers' sake (and the compiler's: two bodies a kernel).
#pragma unroll(kShift ? 2 : layout::kBlockRows / 8)
    for (int i = 0; i < layout::kBlockRows / 8; ++i, out += 8 * p.ld, row_start += row_step) {
      const int row = g + 8 * i;
      if (row >= left_rows) break;
      if (i % 2 == 0) words = codes_of_rows.load(i / 2);
      uint32_t codes[kChunk];
      codes_of_rows.template extract<kOdd>(words, i % 2, codes);
      if constexpr (kFlat) {
        const unsigned first = (row_start & in_group) + static_cast<unsigned>(k);
        slot = static_cast<int>(first >> p.group_shift);
        group_left = static_cast<int>(in_group + 1 - (first & in_group));
      }
      const float scale = decoded.scales[row][slot], zero = kInteger ? decoded.zeros[row][slot] : 0.0f;
      float values[kChunk];
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        values[e] = kTable<kBits> ? lookup((e + kOdd) % 2 % Codes::kTables, codes[e])
                                  : __uint_as_float(0x4B000000u | codes[e]) - magic;
      }
      if ((kFlat || kShift) && group_left < kChunk) {
        const float next_scale = decoded.scales[row][slot + 1];
        const float next_zero = kInteger ? decoded.zeros[row][slot + 1] : 0.0f;
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
          const bool next = e >= group_left;
          values[e] = scaled(values[e], next ? next_scale : scale, next ? next_zero : zero);
        }
      } else {
#pragma unroll
        for (int e = 0; e < kChunk; ++e) values[e] = scaled(values[e], scale, zero);
      }
      const uint4 rounded = round_chunk<Out>(values);
      if (count == kChunk) {
        store_16_bytes(out, rounded);
      } else {
        Out elements[kChunk];
        memcpy(elements, &rounded, sizeof elements);
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
          if (e < count) out[e] = elements[e];
        }
      }
    }
  }

 private:
  __device__ __forceinline__ float lookup(int which, uint32_t offset) const {
    return *reinterpret_cast<const float*>(reinterpret_cast<const uint8_t*>(tables[which]) + offset);
  }
  __device__ __forceinline__ static float scaled(float value, float scale, float zero) {
    return __fmul_rn(kInteger ? __fsub_rn(value, zero) : value, scale);
  }
};

// Thread blocks of an SM that registers must allow: as many as leave every kernel without a spill.
template <int kBits, bool kFlat, bool kShift, class Out>
constexpr int kBlocksPerSm = kShift                                      ? (layout::planes_of(kBits).count == 1 ? 4 : 3)
                             : kFlat || (kBits == 3 && sizeof(Out) == 4) ? 6
                                                                         : 8;

template <int kBits, CodeOrder kOrder, bool kPacked, bool kFlat, bool kShift, class Out>
__global__ void __launch_bounds__(kTileThreads, kBlocksPerSm<kBits, kFlat, kShift, Out>)
    dequantize_tile(const __grid_constant__ DequantParameters p) {
  using Writer = ChunkWriter<kBits, kOrder, kPacked, kFlat, kShift, Out>;
  using Codes = typename Writer::Codes;
  constexpr int kChunk = Writer::kChunk;
  constexpr int kRowThreads = kTileK / kChunk;  // of one row
  constexpr int kPassRows = kTileThreads / kRowThreads;
  static_assert(8 % kPassRows == 0 && kRowThreads % 32 == 0 && kChunk <= kMaxShift + 1);
  __shared__ alignas(16) uint8_t tile[Codes::kBytes];
  __shared__ TileScales decoded;
  __shared__ typename Writer::Tables tables;
  const Weight& w = p.weight;
  const int64_t slab = blockIdx.x / p.tiles, tile_k = blockIdx.x % p.tiles;
  const int64_t first_k = tile_k * kTileK;
  Codes::load(tile, p, slab, tile_k);
  decode_scales<kPacked, Writer::kInteger, kFlat, kShift>(decoded, p, slab, first_k);
  if (kTable<kBits> && threadIdx.x < 1 << kBits) {
    const int code = threadIdx.x;
    const float value = Writer::kInteger ? static_cast<float>(code - w.bias) : p.codebook.value(code);
#pragma unroll
    for (int which = 0; which < Codes::kTables; ++which) tables[which][Codes::table_word(code, which)] = value;
  }
  __pipeline_wait_prior(0);
  __syncthreads();

  const Writer writer{p, tile, decoded, tables, slab, first_k};
  const int chunk = threadIdx.x % kRowThreads;
  const int64_t rest = w.k - first_k;  // of the row
#pragma unroll 1
  for (int g = threadIdx.x / kRowThreads; g < 8; g += kPassRows) {
    if constexpr (!kShift) {
      const int count = static_cast<int>(min(rest - chunk * kChunk, int64_t{kChunk}));
      if (count > 0) writer.template write<false>(g, chunk * kChunk, count);
    } else {
      // The same for rows g, g + 8, ..: eight rows are a multiple of 16 bytes apart.
      const auto address =
          reinterpret_cast<uintptr_t>(static_cast<Out*>(p.out) + (slab * layout::kBlockRows + g) * p.ld + first_k);
      const int shift = static_cast<int>(-address % 16 / sizeof(Out));
      // Before the first whole chunk of a row.
      const bool head = tile_k == 0 && chunk == 0 && shift != 0;
#pragma unroll 1
      for (int k = head ? 0 : shift + chunk * kChunk; k <= shift + chunk * kChunk; k += shift) {
        const int64_t wanted = head && k == 0 ? shift : kChunk;
        const int count = static_cast<int>(min(rest - k, wanted));
        if (count <= 0) break;
        if (k % 2 != 0) {
          writer.template write<true>(g, k, count);
        } else {
          writer.template write<false>(g, k, count);
        }
        if (shift == 0) break;
      }
    }
  }
}

template <int kBits, CodeOrder kOrder, bool kFlat, bool kShift, class Out>
void launch(const DequantParameters& p, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(tile_count(p.weight.n, p.weight.k));
  if (p.weight.packed) {
    dequantize_tile<kBits, kOrder, true, kFlat, kShift, Out><<<grid, kTileThreads, 0, stream>>>(p);
  } else {
    dequantize_tile<kBits, kOrder, false, kFlat, kShift, Out><<<grid, kTileThreads, 0, stream>>>(p);
  }
}

template <int kBits, CodeOrder kOrder, class Out>
void launch(const DequantParameters& p, cudaStream_t stream) {
  const bool shift = !is_aligned(p.out, 16) || p.ld * static_cast<int64_t>(sizeof(Out)) % 16 != 0;
  if constexpr (kOrder == CodeOrder::kPairs) {
    if (p.weight.flat_scales) {
      return shift ? launch<kBits, kOrder, true, true, Out>(p, stream)
                   : launch<kBits, kOrder, true, false, Out>(p, stream);
    }
  }
  return shift ? launch<kBits, kOrder, false, true, Out>(p, stream)
               : launch<kBits, kOrder, false, false, Out>(p, stream);
}

template <class Out>
void launch(const DequantParameters& p, cudaStream_t stream) {
  if (p.weight.order == CodeOrder::kHalves) {
    return p.weight.bits == 4 ? launch<4, CodeOrder::kHalves, Out>(p, stream)
                              : launch<8, CodeOrder::kHalves, Out>(p, stream);
  }
  switch (p.weight.bits) {
    case 2:
      return launch<2, CodeOrder::kPairs, Out>(p, stream);
    case 3:
      return launch<3, CodeOrder::kPairs, Out>(p, stream);
    case 4:
      return launch<4, CodeOrder::kPairs, Out>(p, stream);
    default:
      return launch<5, CodeOrder::kPairs, Out>(p, stream);
  }
}

// Groups shorter than K, and flat ones, are powers of two.
int group_shift(const Weight& w) {
  return !w.flat_scales && w.group_size >= w.k ? kNoShift : __builtin_ctzll(static_cast<uint64_t>(w.group_size));
}

const char* dequantize(const DequantizeProblem& problem) {
  const Weight& w = problem.weight;
  if (w.packed && !is_aligned(w.codes, layout::kMaxPieceBytes)) {
    return "packed codes: expected an address that is a multiple of 16";
  }
  DequantParameters p{};
  p.weight = w;
  p.codebook = CodebookParameter::of(w);
  p.out = problem.out;
  p.ld = problem.ld;
  p.group_shift = group_shift(w);
  p.unit_shift = p.group_shift == kNoShift ? 31 : p.group_shift - __builtin_ctz(kMinGroup);
  p.row_groups = static_cast<int>(w.groups());
  p.groups = w.flat_scales ? layout::ceil_div(w.n * w.k, w.group_size) : w.groups();
  p.packed_groups = layout::packed_groups(w.k, w.group_size);
  p.rows = CodeRows::of(w.n, w.k, w.bits);
  p.blocks = layout::blocks_along_k(w.k);
  p.tiles = static_cast<uint32_t>(tiles_along_k(w.k));
  const auto stream = static_cast<cudaStream_t>(problem.stream);
  switch (problem.dtype) {
    case DType::kFp32:
      launch<float>(p, stream);
      break;
    case DType::kFp16:
      launch<__half>(p, stream);
      break;
    default:
      launch<__nv_bfloat16>(p, stream);
  }
  return launch_error();
}

}  // namespace
}  // namespace cutlass_ext::cuda

namespace cutlass_ext {
extern const Instance cuda_dequant;
const Instance cuda_dequant = {"cuda_dequant", Device::kCuda, Family::kDequant, &cuda::device_available,
                               nullptr,        nullptr,       nullptr,          &cuda::dequantize};
}  // namespace cutlass_ext
