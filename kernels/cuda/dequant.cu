// Packed or canonical weight -> row-major matrix, each value computed in fp32 as kernels/cpu/dequant.hpp computes it
// and rounded once.
//
// A block of threads takes 64 rows x 256 k: codes to shared memory as they lie, scales to shared memory decoded. Then
// every thread makes 16 bytes of the output at a time: 8 codes (4 for fp32) of a row, k ascending. A warp writes 512
// consecutive bytes. For packed codes these are one pair from each of four (two) neighbouring lanes of an atom, whose
// words also hold the chunk eight rows further down.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

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
constexpr int kMaxSlots = kTileK / kMinGroup;  // groups of a row that a tile touches, at most
constexpr int kNoShift = 62;                   // one group: no k reaches the next

struct DequantParameters {
  Weight weight;
  CodebookParameter codebook;
  void* out;
  int64_t ld;
  bool vectors;  // rows of `out` are aligned to 16 bytes
  int group_shift;
  int64_t groups;         // of a row; of the weight where scales are flat
  int64_t packed_groups;  // of a slab
  CodeRows rows;
  int64_t blocks;  // along k
  uint32_t tiles;  // along k
};

// The codes of a tile as they lie in memory, from which a thread reads chunks of a fixed place in the rows.
template <int kBits, CodeOrder kOrder, bool kPacked, int kChunk>
class TileCodes;

template <int kBits, CodeOrder kOrder, int kChunk>
class TileCodes<kBits, kOrder, /*kPacked=*/true, kChunk> {
  // Blocks lie 16 bytes further apart than in memory: threads of a warp read one row of four blocks, which would lie in
  // the same banks.
  static constexpr int kPitch = layout::block_bytes(kBits) + 16;
  static constexpr int kPlaneCount = layout::planes_of(kBits).count;

 public:
  static constexpr int kBytes = kTileBlocks * kPitch;

  static __device__ void load(uint8_t* tile, const DequantParameters& p, int64_t slab, int64_t tile_k) {
    constexpr int kPieces = layout::block_bytes(kBits) / 16;
    const int64_t first = tile_k * kTileBlocks;
    const auto* from =
        reinterpret_cast<const uint4*>(p.weight.codes + (slab * p.blocks + first) * layout::block_bytes(kBits));
    const int count = static_cast<int>(min(int64_t{kTileBlocks}, p.blocks - first)) * kPieces;
#pragma unroll 4
    for (int i = threadIdx.x; i < count; i += kTileThreads) {
      // Asynchronous, so that scales are decoded while codes are on their way.
      __pipeline_memcpy_async(tile + i / kPieces * kPitch + i % kPieces * 16, from + i, 16);
    }
    __pipeline_commit();
  }

  // What rows g and g + 8 of an atom share: the lanes' words that hold the chunk's pairs.
  struct Words {
    uint32_t words[kPlaneCount][kChunk / 2];
  };

  // Chunks at `k` of rows g, g + 8, g + 16, ..
  __device__ TileCodes(const uint8_t* tile, int g, int k, uint32_t /*bias*/)
      : block_(tile + k / layout::kBlockK * kPitch) {
    static_assert(rows_share_words());
    unroll<kPlaneCount>([&](auto plane) {
      const layout::BitAddress first = address(g, k, plane), second = address(g + 8, k, plane);
      byte_[plane] = first.byte / 4 * 4;
      shifts_[0][plane] = first.byte % 4 * 8 + first.shift;
      shifts_[1][plane] = second.byte % 4 * 8 + second.shift;
    });
  }

  // Of an atom; all numbers are constants after unrolling.
  __device__ Words load(int atom) const {
    Words words;
    unroll<kPlaneCount>([&](auto plane) {
      constexpr int kPlane = decltype(plane)::value;
      // Neighbouring lanes lie one piece apart.
      constexpr int kLaneBytes = layout::plane_address({1, 0, 0}, kBits, kPlane, kOrder).byte -
                                 layout::plane_address({0, 0, 0}, kBits, kPlane, kOrder).byte;
      const uint8_t* from = block_ + atom * layout::atom_bytes(kBits) + byte_[kPlane];
#pragma unroll
      for (int i = 0; i < kChunk / 2; ++i) {
        words.words[kPlane][i] = *reinterpret_cast<const uint32_t*>(from + i * kLaneBytes);
      }
    });
    return words;
  }

  // Codes of row g (half 0) or g + 8 (half 1).
  __device__ void extract(const Words& words, int half, uint32_t (&codes)[kChunk]) const {
#pragma unroll
    for (int e = 0; e < kChunk; ++e) codes[e] = 0;
    unroll<kPlaneCount>([&](auto plane) {
      constexpr int kPlane = decltype(plane)::value;
      constexpr int kPlaneBits = layout::planes_of(kBits).bits[kPlane];
      constexpr int kLow = kPlane == 0 ? 0 : layout::planes_of(kBits).bits[0];
      constexpr uint32_t kMask = (1u << kPlaneBits) - 1;
      // The two codes of a pair lie one code or, in halves, 16 bits apart.
      constexpr int kSecond = kOrder == CodeOrder::kHalves ? 16 : kPlaneBits;
#pragma unroll
      for (int e = 0; e < kChunk; e += 2) {
        const uint32_t word = words.words[kPlane][e / 2] >> shifts_[half][kPlane];
        codes[e] |= (word & kMask) << kLow;
        codes[e + 1] |= (word >> kSecond & kMask) << kLow;
      }
    });
  }

 private:
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
  const uint8_t* block_;
  int byte_[kPlaneCount];  // of the first lane's 32-bit word, in the atom
  int shifts_[2][kPlaneCount];
};

template <int kBits, CodeOrder kOrder, int kChunk>
class TileCodes<kBits, kOrder, /*kPacked=*/false, kChunk> {
  using Tile = CanonicalTile<kBits>;

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
  }

  __device__ TileCodes(const uint8_t* tile, int g, int k, uint32_t bias)
      : words_(tile + g * Tile::kPitch + k * kBits / 32 * 4), shift_(k * kBits % 32), flip_(bias) {}

  struct Words {
    uint64_t bits[2];
  };
  __device__ Words load(int atom) const {
    Words words;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto* from =
          reinterpret_cast<const uint32_t*>(words_ + (atom * layout::kAtomRows + 8 * half) * Tile::kPitch);
      words.bits[half] = (from[0] | uint64_t{from[1]} << 32) >> shift_;
    }
    return words;
  }
  __device__ void extract(const Words& words, int half, uint32_t (&codes)[kChunk]) const {
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      codes[e] = (static_cast<uint32_t>(words.bits[half] >> e * kBits) & ((1u << kBits) - 1)) ^ flip_;
    }
  }

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

template <bool kPacked, bool kZeros, bool kFlat>
__device__ void decode_scales(TileScales& tile, const DequantParameters& p, int64_t slab, int64_t first_k) {
  const Weight& w = p.weight;
  const int64_t last_k = min(first_k + kTileK, w.k) - 1;
  // Flat groups may begin anywhere in a tile.
  const int count = kFlat ? ((kTileK - 1) >> p.group_shift) + 2
                          : static_cast<int>((last_k >> p.group_shift) - (first_k >> p.group_shift)) + 1;
  // A thread stays in its row; neighbours are neighbours in memory.
  constexpr int kRowThreads = kTileThreads / layout::kBlockRows;
  const int row = kPacked ? layout::scale_row(threadIdx.x % layout::kBlockRows) : threadIdx.x / kRowThreads;
  const int64_t n = slab * layout::kBlockRows + row;
  const int64_t first_group = ((kFlat ? n * w.k : 0) + first_k) >> p.group_shift;
  const int64_t first_number = kFlat ? first_group : n * p.groups + first_group;
  const int64_t first_index =
      kPacked && !kFlat ? (slab * p.packed_groups + first_group) * layout::kBlockRows + layout::scale_position(row)
                        : first_number;
  constexpr int kStep = kPacked && !kFlat ? layout::kBlockRows : 1;
  for (int slot = kPacked ? threadIdx.x / layout::kBlockRows : threadIdx.x % kRowThreads; slot < count;
       slot += kRowThreads) {
    float scale = 0, zero = 0;
    if (n < w.n && first_group + slot < p.groups) {
      const int64_t index = first_index + slot * kStep;
      scale = decode_scale(w, index, first_number + slot);
      if (kZeros && w.zero_type != ZeroType::kNone) zero = decode_zero(w, index);
    }
    tile.scales[row][slot] = scale;
    if (kZeros) tile.zeros[row][slot] = zero;
  }
}

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

// Flat groups of canonical codes take 40 registers: told nothing, the compiler spills to stay within 32.
template <int kBits, CodeOrder kOrder, bool kPacked, bool kFlat, class Out>
__global__ void __launch_bounds__(kTileThreads, kFlat && !kPacked ? 6 : 0)
    dequantize_tile(const __grid_constant__ DequantParameters p) {
  constexpr int kChunk = 16 / sizeof(Out);
  constexpr int kRowThreads = kTileK / kChunk;  // of one row
  constexpr int kPassRows = kTileThreads / kRowThreads;
  constexpr bool kInteger = kOrder == CodeOrder::kHalves;
  constexpr bool kTable = kBits <= 5;  // integers of 4 bits too: a lookup costs less than a conversion
  using Codes = TileCodes<kBits, kOrder, kPacked, kChunk>;
  static_assert(8 % kPassRows == 0);
  __shared__ alignas(16) uint8_t tile[Codes::kBytes];
  __shared__ TileScales decoded;
  __shared__ float table[kTable ? 1 << kBits : 1];
  const Weight& w = p.weight;
  const int64_t slab = blockIdx.x / p.tiles, tile_k = blockIdx.x % p.tiles;
  const int64_t first_k = tile_k * kTileK;
  Codes::load(tile, p, slab, tile_k);
  decode_scales<kPacked, kInteger, kFlat>(decoded, p, slab, first_k);
  if constexpr (kTable) {
    if (kInteger) {
      if (threadIdx.x < 1 << kBits) table[threadIdx.x] = static_cast<float>(static_cast<int>(threadIdx.x) - w.bias);
    } else {
      p.codebook.template copy_to<kBits>(table);
    }
  }
  __pipeline_wait_prior(0);
  __syncthreads();

  const int k = threadIdx.x % kRowThreads * kChunk;
  const int left_k = static_cast<int>(min(w.k - first_k, int64_t{kTileK})) - k;
  if (left_k <= 0) return;
  const int left_rows = static_cast<int>(min(w.n - slab * layout::kBlockRows, int64_t{layout::kBlockRows}));
  const bool vector = p.vectors && left_k >= kChunk;
  // 2^23 + code is a float whose low bits are the code.
  const float magic = 8388608.0f + static_cast<float>(w.bias);
  int slot = static_cast<int>(((first_k + k) >> p.group_shift) - (first_k >> p.group_shift));
#pragma unroll 1
  for (int g = threadIdx.x / kRowThreads; g < 8; g += kPassRows) {
    const Codes codes_of_rows(tile, g, k, static_cast<uint32_t>(w.bias));
    typename Codes::Words words;
    Out* out = static_cast<Out*>(p.out) + (slab * layout::kBlockRows + g) * p.ld + first_k + k;
#pragma unroll
    for (int i = 0; i < layout::kBlockRows / 8; ++i, out += 8 * p.ld) {
      const int row = g + 8 * i;
      if (row >= left_rows) break;
      if (i % 2 == 0) words = codes_of_rows.load(i / 2);
      uint32_t codes[kChunk];
      codes_of_rows.extract(words, i % 2, codes);
      int group_left = kChunk;  // codes of the chunk in the first one's group: all, unless groups are flat
      if constexpr (kFlat) {
        const int64_t start = (slab * layout::kBlockRows + row) * w.k + first_k;
        slot = static_cast<int>(((start + k) >> p.group_shift) - (start >> p.group_shift));
        group_left = static_cast<int>(min(w.group_size - ((start + k) & (w.group_size - 1)), int64_t{kChunk}));
      }
      const float scale = decoded.scales[row][slot];
      const float next_scale = kFlat && group_left < kChunk ? decoded.scales[row][slot + 1] : scale;
      const float zero = kInteger ? decoded.zeros[row][slot] : 0.0f;
      float values[kChunk];
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        const float value = kTable ? table[codes[e]] : __uint_as_float(0x4B000000u | codes[e]) - magic;
        values[e] = __fmul_rn(kInteger ? __fsub_rn(value, zero) : value, kFlat && e >= group_left ? next_scale : scale);
      }
      const uint4 rounded = round_chunk<Out>(values);
      if (vector) {
        store_16_bytes(out, rounded);
      } else {
        Out elements[kChunk];
        memcpy(elements, &rounded, sizeof elements);
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
          if (e < left_k) out[e] = elements[e];
        }
      }
    }
  }
}

template <int kBits, CodeOrder kOrder, bool kFlat, class Out>
void launch(const DequantParameters& p, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(tile_count(p.weight.n, p.weight.k));
  if (p.weight.packed) {
    dequantize_tile<kBits, kOrder, true, kFlat, Out><<<grid, kTileThreads, 0, stream>>>(p);
  } else {
    dequantize_tile<kBits, kOrder, false, kFlat, Out><<<grid, kTileThreads, 0, stream>>>(p);
  }
}

// Flat groups belong to codebook formats (kernels/format.hpp).
template <int kBits, CodeOrder kOrder, class Out>
void launch(const DequantParameters& p, cudaStream_t stream) {
  if constexpr (kOrder == CodeOrder::kPairs) {
    if (p.weight.flat_scales) return launch<kBits, kOrder, true, Out>(p, stream);
  }
  launch<kBits, kOrder, false, Out>(p, stream);
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
  p.vectors = is_aligned(p.out, 16) && p.ld * size_of(problem.dtype) % 16 == 0;
  p.group_shift = group_shift(w);
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
