// Codes go tile by tile (64 rows x 256 k) through shared memory: whole 16-byte accesses of the canonical rows on one
// side, the lanes' pieces of 16 atoms on the other, both coalesced.
#include <algorithm>

#include "kernels/cuda/canonical_tile.hpp"
#include "kernels/cuda/lane_codes.hpp"
#include "kernels/cuda/launch.hpp"
#include "kernels/cuda/pack.hpp"

namespace cutlass_ext::cuda {
namespace {

using layout::CodeOrder;

constexpr int kWarps = kTileThreads / layout::kLanes;
constexpr int kTileAtoms = kTileBlocks * layout::kAtomsPerBlock;

// Codes k and k + 1 of a row in shared memory, the first in the low bits; k is even.
template <int kBits>
__device__ uint32_t load_pair(const uint8_t* row, int k) {
  const int bit = k * kBits;
  uint32_t bits = row[bit / 8];
  // Pairs of 2 and 4 bits lie in one byte, others in two.
  if constexpr (8 % (2 * kBits) != 0) bits |= uint32_t{row[bit / 8 + 1]} << 8;
  return bits >> bit % 8 & ((1u << 2 * kBits) - 1);
}

// Stores codes k and k + 1 of a row. The four lanes of a quad hold eight consecutive codes: `kBits` whole bytes.
template <int kBits>
__device__ void store_pair(uint8_t* row, int k, uint32_t pair) {
  uint8_t* bytes = row + k * kBits / 8;
  if constexpr (kBits == 8) {
    *reinterpret_cast<uint16_t*>(bytes) = static_cast<uint16_t>(pair);
  } else if constexpr (kBits == 4) {
    *bytes = static_cast<uint8_t>(pair);
  } else {
    const int t = k % 8 / 2;
    uint64_t codes = uint64_t{pair} << 2 * kBits * t;
    codes |= __shfl_xor_sync(0xFFFFFFFFu, codes, 1);
    codes |= __shfl_xor_sync(0xFFFFFFFFu, codes, 2);
    bytes = row + k / 8 * kBits;
    for (int i = t; i < kBits; i += 4) bytes[i] = static_cast<uint8_t>(codes >> 8 * i);
  }
}

struct CodeProblem {
  const uint8_t* from;
  uint8_t* to;
  CodeRows rows;
  int64_t blocks;  // along k
  uint32_t tiles;  // along k
  uint32_t bias;   // signed codes become unsigned, and back: the sign bit is flipped
};

// visit(atom's first byte in the packed codes, row and k of the atom in the tile)
template <int kBits, class Visit>
__device__ void for_each_atom(const CodeProblem& p, int64_t slab, int64_t tile_k, const Visit& visit) {
#pragma unroll 1
  for (int i = threadIdx.x / layout::kLanes; i < kTileAtoms; i += kWarps) {
    const int64_t block = tile_k * kTileBlocks + i / layout::kAtomsPerBlock;
    const int atom = i % layout::kAtomsPerBlock;
    if (block >= p.blocks) return;
    const int64_t offset = (slab * p.blocks + block) * layout::block_bytes(kBits) + atom * layout::atom_bytes(kBits);
    visit(offset, atom * layout::kAtomRows, i / layout::kAtomsPerBlock * layout::kBlockK);
  }
}

// visit(step, value) with the even values of a lane's fragments, as constants
template <class Visit>
__device__ void for_each_pair(const Visit& visit) {
  unroll<layout::kSteps>([&](auto step) {
    unroll<layout::kCodesPerStep / 2>(
        [&](auto pair) { visit(step, std::integral_constant<int, 2 * decltype(pair)::value>{}); });
  });
}

template <int kBits, CodeOrder kOrder, class Access>
__global__ void __launch_bounds__(kTileThreads) pack_codes(CodeProblem p) {
  using Tile = CanonicalTile<kBits>;
  __shared__ alignas(16) uint8_t tile[Tile::kBytes];
  const int64_t slab = blockIdx.x / p.tiles, tile_k = blockIdx.x % p.tiles;
  const int lane = threadIdx.x % layout::kLanes;
  Tile::template load<Access>(tile, p.from, p.rows, slab, tile_k);
  __syncthreads();
  const uint32_t flip = p.bias | p.bias << kBits;
  for_each_atom<kBits>(p, slab, tile_k, [&](int64_t offset, int row, int k) {
    LaneCodes<kBits, kOrder> codes;
    for_each_pair([&](auto step, auto value) {
      constexpr int kStep = decltype(step)::value, kValue = decltype(value)::value;
      const layout::Fragment f{lane, kStep, kValue};
      const uint32_t pair = load_pair<kBits>(tile + (row + layout::row_of(f)) * Tile::kPitch, k + layout::k_of(f));
      codes.template insert<kStep, kValue>(pair ^ flip);
    });
    codes.store(p.to + offset, lane);
  });
}

template <int kBits, CodeOrder kOrder, class Access>
__global__ void __launch_bounds__(kTileThreads) unpack_codes(CodeProblem p) {
  using Tile = CanonicalTile<kBits>;
  __shared__ alignas(16) uint8_t tile[Tile::kBytes];
  const int64_t slab = blockIdx.x / p.tiles, tile_k = blockIdx.x % p.tiles;
  const int lane = threadIdx.x % layout::kLanes;
  const uint32_t flip = p.bias | p.bias << kBits;
  for_each_atom<kBits>(p, slab, tile_k, [&](int64_t offset, int row, int k) {
    LaneCodes<kBits, kOrder> codes;
    codes.load(p.from + offset, lane);
    for_each_pair([&](auto step, auto value) {
      constexpr int kStep = decltype(step)::value, kValue = decltype(value)::value;
      const layout::Fragment f{lane, kStep, kValue};
      store_pair<kBits>(tile + (row + layout::row_of(f)) * Tile::kPitch, k + layout::k_of(f),
                        codes.template pair<kStep, kValue>() ^ flip);
    });
  });
  __syncthreads();
  Tile::template store<Access>(tile, p.to, p.rows, slab, tile_k);
}

template <int kBits, CodeOrder kOrder>
void launch_codes(const Weight& w, bool pack, uint8_t* to, cudaStream_t stream) {
  const CodeProblem p{w.codes,
                      to,
                      CodeRows::of(w.n, w.k, kBits),
                      layout::blocks_along_k(w.k),
                      static_cast<uint32_t>(tiles_along_k(w.k)),
                      static_cast<uint32_t>(w.bias)};
  const auto grid = static_cast<unsigned>(tile_count(w.n, w.k));
  with_access(pack ? w.codes : to, p.rows.bytes, [&](auto access) {
    using Access = decltype(access);
    if (pack) {
      pack_codes<kBits, kOrder, Access><<<grid, kTileThreads, 0, stream>>>(p);
    } else {
      unpack_codes<kBits, kOrder, Access><<<grid, kTileThreads, 0, stream>>>(p);
    }
  });
}

void convert_codes(const Weight& w, bool pack, uint8_t* to, cudaStream_t stream) {
  if (w.order == CodeOrder::kHalves) {
    return w.bits == 4 ? launch_codes<4, CodeOrder::kHalves>(w, pack, to, stream)
                       : launch_codes<8, CodeOrder::kHalves>(w, pack, to, stream);
  }
  switch (w.bits) {
    case 2:
      return launch_codes<2, CodeOrder::kPairs>(w, pack, to, stream);
    case 3:
      return launch_codes<3, CodeOrder::kPairs>(w, pack, to, stream);
    case 4:
      return launch_codes<4, CodeOrder::kPairs>(w, pack, to, stream);
    default:
      return launch_codes<5, CodeOrder::kPairs>(w, pack, to, stream);
  }
}

constexpr int kTileGroups = 64;

struct GroupProblem {
  int64_t n;
  int64_t groups;  // of a row
  int64_t padded;  // of a slab
  uint32_t tiles;  // of a slab
};

// Scales or zeros of one byte size: canonical [N, groups] and packed [slab][group][64], 64 x 64 at a time.
template <class T>
__global__ void __launch_bounds__(kTileThreads) convert_groups(const T* from, T* to, GroupProblem p, bool pack) {
  __shared__ T tile[layout::kBlockRows][kTileGroups + 4 / sizeof(T)];  // one bank further every row
  const int64_t slab = blockIdx.x / p.tiles, first = int64_t{blockIdx.x % p.tiles} * kTileGroups;
  const int count = static_cast<int>(min(int64_t{kTileGroups}, p.padded - first));
  const auto canonical = [&](const auto& visit) {
    for (int row = threadIdx.x / layout::kLanes; row < layout::kBlockRows; row += kWarps) {
      const int64_t n = slab * layout::kBlockRows + row;
      for (int i = threadIdx.x % layout::kLanes; i < count; i += layout::kLanes) {
        visit(tile[row][i], n * p.groups + first + i, n < p.n && first + i < p.groups);
      }
    }
  };
  const auto packed = [&](const auto& visit) {
    for (int i = threadIdx.x; i < count * layout::kBlockRows; i += kTileThreads) {
      const int64_t group = first + i / layout::kBlockRows;
      const int position = i % layout::kBlockRows;
      visit(tile[layout::scale_row(position)][group - first],
            (slab * p.padded + group) * layout::kBlockRows + position);
    }
  };
  if (pack) {
    canonical([&](T& value, int64_t at, bool inside) { value = inside ? from[at] : T{}; });
    __syncthreads();
    packed([&](const T& value, int64_t at) { to[at] = value; });
  } else {
    packed([&](T& value, int64_t at) { value = from[at]; });
    __syncthreads();
    canonical([&](const T& value, int64_t at, bool inside) {
      if (inside) to[at] = value;
    });
  }
}

template <class T>
void launch_groups(const Weight& w, bool pack, const void* from, void* to, cudaStream_t stream) {
  const int64_t padded = layout::packed_groups(w.k, w.group_size);
  const int64_t tiles = layout::ceil_div(padded, kTileGroups);
  const GroupProblem p{w.n, w.groups(), padded, static_cast<uint32_t>(tiles)};
  convert_groups<T><<<static_cast<unsigned>(layout::slabs(w.n) * tiles), kTileThreads, 0, stream>>>(
      static_cast<const T*>(from), static_cast<T*>(to), p, pack);
}

void convert_groups(const Weight& w, bool pack, const void* from, void* to, int size, cudaStream_t stream) {
  if (w.flat_scales) {
    const int64_t bytes = layout::ceil_div(w.n * w.k, w.group_size) * size;
    cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream);
  } else if (size == 1) {
    launch_groups<uint8_t>(w, pack, from, to, stream);
  } else if (size == 2) {
    launch_groups<uint16_t>(w, pack, from, to, stream);
  } else {
    launch_groups<uint32_t>(w, pack, from, to, stream);
  }
}

}  // namespace

const char* convert_layout(const Weight& from, bool pack, void* codes, void* scales, void* zeros, void* stream_in) {
  const auto stream = static_cast<cudaStream_t>(stream_in);
  if (!is_aligned(pack ? codes : from.codes, layout::kMaxPieceBytes)) {
    return "packed codes: expected an address that is a multiple of 16";
  }
  convert_codes(from, pack, static_cast<uint8_t*>(codes), stream);
  convert_groups(from, pack, from.scales, scales, size_of(from.scale_type), stream);
  if (from.zeros != nullptr) {
    convert_groups(from, pack, from.zeros, zeros, zero_size(from.zero_type, from.scale_type), stream);
  }
  return launch_error();
}

}  // namespace cutlass_ext::cuda
