// The compile-time side of a weight: what changes the inner loop. The rest of a Weight is read at run time.
#pragma once

#include <cstdint>

#include "kernels/cpu/codes.hpp"
#include "kernels/cpu/scales.hpp"

namespace cutlass_ext::cpu {

template <class Isa_, int kBits, layout::CodeOrder kOrder, Groups kGroups_, bool kZeros_>
struct WeightKind {
  using Isa = Isa_;
  using F = typename Isa::F;
  using Codes = cpu::Codes<Isa, kBits, kOrder>;
  using Scales = SlabScales<Isa, kGroups_, kZeros_>;
  static constexpr Groups kGroups = kGroups_;
  static constexpr bool kZeros = kZeros_;

  // The weights of rows g and g + 8 of an atom in a block, as slots. `codes` points at the atom.
  static CX_INLINE void decode_rows(const Codes& decoder, const Scales& scales, const uint8_t* codes, int64_t block,
                                    int atom, int g, F (&weights)[2][kSlots]) {
    const auto words = Codes::load(codes, g);
    unroll<Isa, 2>([&](auto row) __attribute__((always_inline)) {
      constexpr int kRow = decltype(row)::value;
      const int position = scale_position(atom, g, kRow);
      F scale[kSlots];
      if constexpr (kGroups == Groups::kFlat) {
        scales.flat_row(block, layout::scale_row(position), scale);
      } else {
        for (int slot = 0; slot < kSlots; ++slot) scale[slot] = scales.row_scale(block, position);
      }
      unroll<Isa, kSlots>([&](auto slot) __attribute__((always_inline)) {
        constexpr int kSlot = decltype(slot)::value;
        F value = decoder.template value<kRow, kSlot>(words);
        if constexpr (kZeros) value = Isa::sub(value, scales.row_zero(block, position));
        weights[kRow][kSlot] = Isa::mul(value, scale[kSlot]);
      });
    });
  }

  // layout::scale_position of row g + 8 * row of an atom, in a form that is an offset to a constant.
  static constexpr int scale_position(int atom, int g, int row) { return g * 8 + row + atom * 2; }
  static_assert(layout::scale_position(0) == 0 && layout::scale_position(1) == 8 && layout::scale_position(8) == 1 &&
                layout::scale_position(layout::kAtomRows) == 2);
};

// body(kind) with the kind of a weight.
template <class Isa, int kBits, class Body>
static void with_codebook_kind(const Weight& w, const Body& body) {
  constexpr auto kOrder = layout::CodeOrder::kPairs;
  switch (groups_of(w)) {
    case Groups::kWhole:
      return body(WeightKind<Isa, kBits, kOrder, Groups::kWhole, false>{});
    case Groups::kSteps:
      return body(WeightKind<Isa, kBits, kOrder, Groups::kSteps, false>{});
    case Groups::kFlat:
      return body(WeightKind<Isa, kBits, kOrder, Groups::kFlat, false>{});
  }
}

template <class Isa, int kBits, bool kZeros, class Body>
static void with_integer_kind(const Weight& w, const Body& body) {
  constexpr auto kOrder = layout::CodeOrder::kHalves;
  if (groups_of(w) == Groups::kWhole) {
    body(WeightKind<Isa, kBits, kOrder, Groups::kWhole, kZeros>{});
  } else {
    body(WeightKind<Isa, kBits, kOrder, Groups::kSteps, kZeros>{});
  }
}

template <class Isa, class Body>
static void with_kind(const Weight& w, const Body& body) {
  if (w.is_codebook) {
    switch (w.bits) {
      case 2:
        return with_codebook_kind<Isa, 2>(w, body);
      case 3:
        return with_codebook_kind<Isa, 3>(w, body);
      case 4:
        return with_codebook_kind<Isa, 4>(w, body);
      default:
        return with_codebook_kind<Isa, 5>(w, body);
    }
  }
  const bool zeros = w.zero_type != ZeroType::kNone;
  if (w.bits == 4) {
    zeros ? with_integer_kind<Isa, 4, true>(w, body) : with_integer_kind<Isa, 4, false>(w, body);
  } else {
    zeros ? with_integer_kind<Isa, 8, true>(w, body) : with_integer_kind<Isa, 8, false>(w, body);
  }
}

}  // namespace cutlass_ext::cpu
