// Packed codes to fp32, 16 at a time, without leaving the order of the packed layout.
//
// The 4-bit words of four lanes (one g, t = 0..3; kernels/layout.hpp) are 64 bytes: element 4t + step holds the eight
// codes of rows g and g + 8 at the four k of "slot" 0..3, which are 16 step + {2t, 2t + 1, 2t + 8, 2t + 9}. So one
// shift and one table lookup give 16 weights of a row; x is permuted to slots once per call, and nothing is unpacked.
// Other widths are brought to the same element order when they are loaded.
#pragma once

#include <cstdint>

#include "kernels/cpu/inline.hpp"
#include "kernels/layout.hpp"

namespace cutlass_ext::cpu {

constexpr int kVector = 16;  // elements of a vector, on every instruction set
constexpr int kSlots = 4;    // vectors of a row of a block
constexpr int kPairs = 8;    // row pairs (g, g + 8) of an atom

// k in the block of an element of a slot.
static constexpr int slot_k(int slot, int element) {
  return element % 4 * layout::kStepK + element / 4 * 2 + slot % 2 + slot / 2 * 8;
}

// Value of the fragment that holds row g + 8 * row in a slot.
static constexpr int fragment_value(int row, int slot) { return slot % 2 + 2 * row + slot / 2 * 4; }

template <class Isa, int kBits, layout::CodeOrder kOrder>
class Codes {
  using F = typename Isa::F;
  using I = typename Isa::I;

 public:
  static constexpr int kAtomBytes = layout::atom_bytes(kBits);
  static constexpr bool kTwoWords = kBits == 5 || kBits == 8;  // eight codes need more than 32 bits

  struct Words {
    I low, high;  // high only if kTwoWords
  };

  explicit CX_INLINE Codes(const float* codebook, int bias) : table_(Values(codebook, bias).values), bias_(bias) {}

  // The codes of rows g and g + 8 of an atom.
  static CX_INLINE Words load(const uint8_t* atom, int g) {
    constexpr int kLowPlane = layout::kAtomRows * layout::kBlockK * layout::planes_of(kBits).bits[0] / 8;
    if constexpr (kBits == 2) {
      const I low = Isa::spread2(atom + 32 * g);
      return {low, low};
    } else if constexpr (kBits == 3) {
      const I high = Isa::template shift_right<-16>(Isa::spread4(atom + kLowPlane + 16 * g));
      const I both = Isa::merge(Isa::spread2(atom + 32 * g), high, 0xFFFF);
      return {both, both};
    } else if constexpr (kBits == 4) {
      const I low = Isa::load_words(atom + 64 * g);
      return {low, low};
    } else if constexpr (kBits == 5) {
      return {Isa::load_words(atom + 64 * g), Isa::spread4(atom + kLowPlane + 16 * g)};
    } else {
      const I first = Isa::load_words(atom + 64 * g);
      const I second = Isa::load_words(atom + kAtomBytes / 2 + 64 * g);
      return {Isa::even_words(first, second), Isa::odd_words(first, second)};
    }
  }

  // Decoded values of row g + 8 * kRow in a slot.
  template <int kRow, int kSlot>
  CX_INLINE F value(const Words& words) const {
    constexpr int kValue = fragment_value(kRow, kSlot);
    if constexpr (kBits == 2) {
      return table_[Isa::template shift_right<2 * kValue>(words.low)];
    } else if constexpr (kBits == 3) {
      return table_[Isa::merge(Isa::template shift_right<2 * kValue>(words.low),
                               Isa::template shift_right<14 + kValue>(words.low), 3)];
    } else if constexpr (kBits == 4) {
      constexpr int kShift = kOrder == layout::CodeOrder::kPairs ? 4 * kValue : kValue / 2 * 4 + kValue % 2 * 16;
      return table_[Isa::template shift_right<kShift>(words.low)];
    } else if constexpr (kBits == 5) {
      return table_[Isa::merge(Isa::template shift_right<4 * kValue>(words.low),
                               Isa::template shift_right<kValue - 4>(words.high), 15)];
    } else {
      const I word = kSlot < 2 ? words.low : words.high;
      const I code = Isa::and_mask(Isa::template shift_right<8 * kRow + kSlot % 2 * 16>(word), 0xFF);
      return Isa::to_float(Isa::subtract(code, bias_));
    }
  }

 private:
  // Integers of up to 4 bits go through a table too: one lookup against conversion and subtraction.
  struct Values {
    float values[32];

    CX_INLINE Values(const float* codebook, int bias) {
      for (int i = 0; i < 32; ++i) {
        const int code = i % (1 << (kBits < 5 ? kBits : 5));
        values[i] = codebook != nullptr ? codebook[code] : static_cast<float>(code - bias);
      }
    }
  };

  typename Isa::template Table<kBits == 8 ? 2 : kBits> table_;  // unused at 8 bits
  int bias_;
};

}  // namespace cutlass_ext::cpu
