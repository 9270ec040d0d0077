// The 32 codes of a lane of an atom as the words that the packed layout stores, derived from layout::plane_address.
#pragma once

#include <cstdint>

#include "kernels/cuda/unroll.hpp"
#include "kernels/layout.hpp"

namespace cutlass_ext::cuda {

template <int kBits, layout::CodeOrder kOrder>
struct LaneCodes {
  static constexpr layout::Planes kPlanes = layout::planes_of(kBits);

  uint32_t words[kBits] = {};  // those of the first plane, then those of the second

  static constexpr int plane_bits(int plane) { return kPlanes.bits[plane]; }
  static constexpr int first_word(int plane) { return plane == 0 ? 0 : kPlanes.bits[0]; }
  static constexpr int plane_base(int plane) { return layout::plane_address({0, 0, 0}, kBits, plane, kOrder).byte; }
  // Bytes of a piece: the distance of two lanes.
  static constexpr int piece_bytes(int plane) {
    return layout::plane_address({1, 0, 0}, kBits, plane, kOrder).byte - plane_base(plane);
  }
  static constexpr int pieces(int plane) { return 4 * plane_bits(plane) / piece_bytes(plane); }

  struct Place {
    int word;
    int shift;
  };
  static constexpr Place place(int step, int value, int plane) {
    const layout::BitAddress at = layout::plane_address({0, step, value}, kBits, plane, kOrder);
    const int offset = at.byte - plane_base(plane);
    const int piece = offset / (layout::kLanes * piece_bytes(plane));
    const int byte = piece * piece_bytes(plane) + offset % (layout::kLanes * piece_bytes(plane));
    return {first_word(plane) + byte / 4, byte % 4 * 8 + at.shift};
  }

  // Codes kValue and kValue + 1 of step kStep, the first in the low bits. kValue is even.
  template <int kStep, int kValue>
  __device__ uint32_t pair() const {
    uint32_t codes = 0;
    unroll<kPlanes.count>([&](auto plane) {
      constexpr int kPlane = decltype(plane)::value;
      constexpr uint32_t kMask = (1u << plane_bits(kPlane)) - 1;
      constexpr int kLow = kPlane == 0 ? 0 : kPlanes.bits[0];
      constexpr Place kFirst = place(kStep, kValue, kPlane), kSecond = place(kStep, kValue + 1, kPlane);
      codes |= (words[kFirst.word] >> kFirst.shift & kMask) << kLow;
      codes |= (words[kSecond.word] >> kSecond.shift & kMask) << (kBits + kLow);
    });
    return codes;
  }

  // The inverse of pair, on words that are 0 there.
  template <int kStep, int kValue>
  __device__ void insert(uint32_t codes) {
    unroll<kPlanes.count>([&](auto plane) {
      constexpr int kPlane = decltype(plane)::value;
      constexpr uint32_t kMask = (1u << plane_bits(kPlane)) - 1;
      constexpr int kLow = kPlane == 0 ? 0 : kPlanes.bits[0];
      constexpr Place kFirst = place(kStep, kValue, kPlane), kSecond = place(kStep, kValue + 1, kPlane);
      words[kFirst.word] |= (codes >> kLow & kMask) << kFirst.shift;
      words[kSecond.word] |= (codes >> (kBits + kLow) & kMask) << kSecond.shift;
    });
  }

  // From and to an atom; the address is that of the atom's first byte.
  __device__ void load(const uint8_t* atom, int lane) {
    for_each_piece([&](auto access, int offset, uint32_t* words_of_piece) {
      using Access = decltype(access);
      const auto value = *reinterpret_cast<const Access*>(atom + offset + lane * static_cast<int>(sizeof(Access)));
      memcpy(words_of_piece, &value, sizeof value);
    });
  }
  __device__ void store(uint8_t* atom, int lane) {
    for_each_piece([&](auto access, int offset, uint32_t* words_of_piece) {
      using Access = decltype(access);
      Access value;
      memcpy(&value, words_of_piece, sizeof value);
      *reinterpret_cast<Access*>(atom + offset + lane * static_cast<int>(sizeof(Access))) = value;
    });
  }

 private:
  template <class Body>
  __device__ void for_each_piece(const Body& body) {
    unroll<kPlanes.count>([&](auto plane) {
      constexpr int kPlane = decltype(plane)::value;
      constexpr int kPiece = piece_bytes(kPlane);
      using Access = std::conditional_t<kPiece == 16, uint4, std::conditional_t<kPiece == 8, uint2, uint32_t>>;
      static_assert(sizeof(Access) == kPiece);
      unroll<pieces(kPlane)>([&](auto piece) {
        constexpr int kIndex = decltype(piece)::value;
        body(Access{}, plane_base(kPlane) + kIndex * layout::kLanes * kPiece,
             words + first_word(kPlane) + kIndex * kPiece / 4);
      });
    });
  }
};

}  // namespace cutlass_ext::cuda
