// Canonical <-> packed on the CPU, written from kernels/layout.hpp.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/format.hpp"
#include "kernels/layout.hpp"

namespace cutlass_ext::cpu {

// Which codes of an atom stand in each of its bytes: the inverse of layout::plane_address, as a table.
template <int kBits, layout::CodeOrder kOrder>
struct AtomMap {
  static constexpr int kBytes = layout::atom_bytes(kBits);
  uint16_t source[kBytes][8]{};  // [byte][i]: row * 64 + k of the i-th code from the lowest bit
  constexpr AtomMap() {
    for (int row = 0; row < layout::kAtomRows; ++row) {
      for (int k = 0; k < layout::kBlockK; ++k) {
        for (int plane = 0; plane < layout::planes_of(kBits).count; ++plane) {
          const auto at = layout::plane_address(layout::fragment_of(row, k), kBits, plane, kOrder);
          source[at.byte][at.shift / layout::planes_of(kBits).bits[plane]] =
              static_cast<uint16_t>(row * layout::kBlockK + k);
        }
      }
    }
  }
};

template <int kBits, layout::CodeOrder kOrder>
inline constexpr AtomMap<kBits, kOrder> kAtomMap{};

// Calls visit(byte, source, bits of the plane, lowest bit of the plane, index in the byte) for every code of every
// byte of an atom, with the plane's numbers as compile-time constants.
template <int kBits, int kPlane, class Visit>
void for_each_plane_code(Visit visit) {
  constexpr layout::Planes kPlanes = layout::planes_of(kBits);
  constexpr int kPlaneBits = kPlanes.bits[kPlane];
  constexpr int kLow = kPlane == 0 ? 0 : kPlanes.bits[0];
  constexpr int kBegin = layout::kAtomRows * layout::kBlockK * kLow / 8;
  constexpr int kEnd = kBegin + layout::kAtomRows * layout::kBlockK * kPlaneBits / 8;
  for (int byte = kBegin; byte < kEnd; ++byte) visit(byte, kPlaneBits, kLow);
  if constexpr (kPlane + 1 < kPlanes.count) for_each_plane_code<kBits, kPlane + 1>(visit);
}

template <int kBits, layout::CodeOrder kOrder>
void pack_atom(const uint8_t* codes /* [16][64] */, uint8_t* atom) {
  for_each_plane_code<kBits, 0>([&](int byte, int plane_bits, int low) {
    unsigned value = 0;
    for (int i = 0; i < 8 / plane_bits; ++i) {
      const unsigned code = codes[kAtomMap<kBits, kOrder>.source[byte][i]];
      value |= ((code >> low) & ((1u << plane_bits) - 1)) << (plane_bits * i);
    }
    atom[byte] = static_cast<uint8_t>(value);
  });
}

template <int kBits, layout::CodeOrder kOrder>
void unpack_atom(const uint8_t* atom, uint8_t* codes /* [16][64] */) {
  if (layout::planes_of(kBits).count > 1) std::memset(codes, 0, layout::kAtomRows * layout::kBlockK);
  for_each_plane_code<kBits, 0>([&](int byte, int plane_bits, int low) {
    for (int i = 0; i < 8 / plane_bits; ++i) {
      const unsigned part = (unsigned{atom[byte]} >> (plane_bits * i)) & ((1u << plane_bits) - 1);
      uint8_t& code = codes[kAtomMap<kBits, kOrder>.source[byte][i]];
      code = static_cast<uint8_t>(low == 0 ? part : code | part << low);
    }
  });
}

// 64 codes of a canonical row, as bytes. `stream` holds 8 * kBits bytes.
template <int kBits>
void expand_codes(const uint8_t* stream, uint8_t* codes) {
  constexpr unsigned kMask = (1u << kBits) - 1;
  for (int i = 0; i < layout::kBlockK / 8; ++i) {  // eight codes are kBits whole bytes
    uint64_t word = 0;
    std::memcpy(&word, stream + i * kBits, kBits);
    for (int j = 0; j < 8; ++j) codes[8 * i + j] = static_cast<uint8_t>((word >> (kBits * j)) & kMask);
  }
}

template <int kBits>
void compress_codes(const uint8_t* codes, uint8_t* stream) {
  for (int i = 0; i < layout::kBlockK / 8; ++i) {
    uint64_t word = 0;
    for (int j = 0; j < 8; ++j) word |= static_cast<uint64_t>(codes[8 * i + j]) << (kBits * j);
    std::memcpy(stream + i * kBits, &word, kBits);
  }
}

struct CodeShape {
  int64_t n;
  int64_t k;
  int bias;  // signed codes become unsigned: the sign bit is flipped
};

// Both directions go block by block through the block's codes as bytes, [64][64]. Rows and columns beyond N and K hold
// canonical code 0.
template <int kBits, layout::CodeOrder kOrder>
void pack_codes(const uint8_t* canonical, uint8_t* packed, CodeShape shape) {
  constexpr int kRun = layout::kBlockK * kBits / 8;  // bytes of a row in a block
  const int64_t row_bytes = layout::ceil_div(shape.k * kBits, 8);
  const int64_t blocks = layout::blocks_along_k(shape.k);
#pragma omp parallel for
  for (int64_t slab = 0; slab < layout::slabs(shape.n); ++slab) {
    alignas(64) uint8_t codes[layout::kBlockRows * layout::kBlockK];
    for (int64_t block = 0; block < blocks; ++block) {
      for (int row = 0; row < layout::kBlockRows; ++row) {
        uint8_t run[kRun] = {};
        const int64_t n = slab * layout::kBlockRows + row;
        const int64_t left = row_bytes - block * kRun;
        if (n < shape.n) {
          std::memcpy(run, canonical + n * row_bytes + block * kRun, static_cast<size_t>(left < kRun ? left : kRun));
        }
        expand_codes<kBits>(run, codes + row * layout::kBlockK);
      }
      for (uint8_t& code : codes) code ^= static_cast<uint8_t>(shape.bias);
      uint8_t* out = packed + (slab * blocks + block) * layout::block_bytes(kBits);
      for (int atom = 0; atom < layout::kAtomsPerBlock; ++atom) {
        pack_atom<kBits, kOrder>(codes + atom * layout::kAtomRows * layout::kBlockK,
                                 out + atom * layout::atom_bytes(kBits));
      }
    }
  }
}

template <int kBits, layout::CodeOrder kOrder>
void unpack_codes(const uint8_t* packed, uint8_t* canonical, CodeShape shape) {
  constexpr int kRun = layout::kBlockK * kBits / 8;
  const int64_t row_bytes = layout::ceil_div(shape.k * kBits, 8);
  const int64_t blocks = layout::blocks_along_k(shape.k);
#pragma omp parallel for
  for (int64_t slab = 0; slab < layout::slabs(shape.n); ++slab) {
    alignas(64) uint8_t codes[layout::kBlockRows * layout::kBlockK];
    for (int64_t block = 0; block < blocks; ++block) {
      const uint8_t* in = packed + (slab * blocks + block) * layout::block_bytes(kBits);
      for (int atom = 0; atom < layout::kAtomsPerBlock; ++atom) {
        unpack_atom<kBits, kOrder>(in + atom * layout::atom_bytes(kBits),
                                   codes + atom * layout::kAtomRows * layout::kBlockK);
      }
      for (uint8_t& code : codes) code ^= static_cast<uint8_t>(shape.bias);
      for (int row = 0; row < layout::kBlockRows; ++row) {
        const int64_t n = slab * layout::kBlockRows + row;
        if (n >= shape.n) break;
        uint8_t run[kRun];
        compress_codes<kBits>(codes + row * layout::kBlockK, run);
        const int64_t left = row_bytes - block * kRun;
        std::memcpy(canonical + n * row_bytes + block * kRun, run, static_cast<size_t>(left < kRun ? left : kRun));
      }
    }
  }
}

struct GroupShape {
  int64_t n;
  int64_t k;
  int64_t group_size;
};

// Scales or zeros of one byte size: canonical [N, groups] -> packed [slab][group][64], padded with zeros.
template <class T>
void pack_groups(const T* canonical, T* packed, GroupShape shape) {
  const int64_t groups = layout::ceil_div(shape.k, shape.group_size);
  const int64_t padded = layout::packed_groups(shape.k, shape.group_size);
  for (int64_t slab = 0; slab < layout::slabs(shape.n); ++slab) {
    for (int64_t group = 0; group < padded; ++group) {
      for (int i = 0; i < layout::kBlockRows; ++i) {
        const int64_t n = slab * layout::kBlockRows + layout::scale_row(i);
        *packed++ = n < shape.n && group < groups ? canonical[n * groups + group] : T{};
      }
    }
  }
}

template <class T>
void unpack_groups(const T* packed, T* canonical, GroupShape shape) {
  const int64_t groups = layout::ceil_div(shape.k, shape.group_size);
  for (int64_t n = 0; n < shape.n; ++n) {
    for (int64_t group = 0; group < groups; ++group) {
      canonical[n * groups + group] = packed[layout::packed_scale_index(n, group, shape.k, shape.group_size)];
    }
  }
}

}  // namespace cutlass_ext::cpu
