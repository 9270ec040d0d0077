// The packed weight as a row-major matrix, each value rounded once.
#pragma once

#include <cstdint>

#include "kernels/cpu/values.hpp"
#include "kernels/cpu/weight_kind.hpp"
#include "kernels/instance.hpp"

namespace cutlass_ext::cpu {

template <class Kind>
static void dequantize_atoms(const DequantizeProblem& p, int64_t first_atom, int64_t last_atom) {
  using Isa = typename Kind::Isa;
  using F = typename Isa::F;
  const int64_t blocks = layout::blocks_along_k(p.weight.k);
  const typename Kind::Codes decoder(p.weight.codebook, p.weight.bias);
  typename Kind::Scales scales(p.weight);
  for (int64_t atom_index = first_atom; atom_index < last_atom; ++atom_index) {
    const int64_t slab = atom_index / layout::kAtomsPerBlock;
    const int atom = static_cast<int>(atom_index % layout::kAtomsPerBlock);
    scales.start_slab(slab);
    for (int64_t block = 0; block < blocks; ++block) {
      const uint8_t* codes =
          p.weight.codes + ((slab * blocks + block) * layout::kAtomsPerBlock + atom) * Kind::Codes::kAtomBytes;
      if (block % kRunBlocks == 0) scales.decode(block, block + kRunBlocks < blocks ? block + kRunBlocks : blocks);
      for (int g = 0; g < kPairs; ++g) {
        F weights[2][kSlots];
        Kind::decode_rows(decoder, scales, codes, block, atom, g, weights);
        for (int row = 0; row < 2; ++row) {
          const int64_t n = atom_index * layout::kAtomRows + g + 8 * row;
          if (n >= p.weight.n) continue;
          F natural[kSlots];
          Isa::to_natural(weights[row], natural);
          for (int i = 0; i < kSlots; ++i) {
            const int64_t k = block * layout::kBlockK + i * kVector;
            store_values<Isa>(p.out, n * p.ld + k, p.dtype, natural[i], p.weight.k - k);
          }
        }
      }
    }
  }
}

template <class Isa>
static const char* dequantize(const DequantizeProblem& p) {
  const int64_t atoms = layout::ceil_div(p.weight.n, layout::kAtomRows);
  with_kind<Isa>(p.weight, [&](auto kind) {
    using Kind = decltype(kind);
#pragma omp parallel for num_threads(p.threads) schedule(static, 1)
    for (int part = 0; part < p.threads; ++part) {
      dequantize_atoms<Kind>(p, atoms * part / p.threads, atoms * (part + 1) / p.threads);
    }
  });
  return nullptr;
}

template <class Isa>
constexpr Instance make_dequant_instance(const char* name) {
  return {name, Device::kCpu, Family::kDequant, &Isa::available, nullptr, nullptr, nullptr, &dequantize<Isa>};
}

}  // namespace cutlass_ext::cpu
