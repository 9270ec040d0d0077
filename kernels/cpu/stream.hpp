// y = x @ W^T + bias for few tokens: every packed weight is read and decoded once, and used for all tokens.
//
// The dot products run along k in the slots of codes.hpp, 16 partial sums a row, so decoded weights never leave
// registers. Partial sums of a run of blocks are added to the row's total: two levels, whose rounding errors grow with
// sqrt(run) + sqrt(runs) instead of sqrt(K). A row's sum does not depend on the threads, which share out atoms.
#pragma once

#include <cstdint>

#include "kernels/cpu/values.hpp"
#include "kernels/cpu/weight_kind.hpp"
#include "kernels/instance.hpp"

namespace cutlass_ext::cpu {

// x in slots: [block][token][slot][16].
constexpr int64_t kSlotRow = kSlots * kVector;
// Rows of x in slots that one thread packs faster (40 ns each) than several threads meet at a barrier.
constexpr int64_t kSerialRows = 256;

template <class Isa>
struct StreamPlan {
  int64_t blocks;
  int64_t tokens;  // handled in one pass over the weight
  size_t x_bytes;
  size_t sums_bytes;  // of a thread: the totals of a slab's four atoms, then one run's sums of an atom

  explicit StreamPlan(const GemmProblem& p) : blocks(layout::blocks_along_k(p.weight.k)) {
    // 32 tokens: their sums of an atom, 1 KB each, fill the L1 cache. 8 MB of x: bounds the workspace for huge K.
    constexpr int64_t kMaxTokens = 32;
    constexpr int64_t kMaxBytes = int64_t{8} << 20;
    const int64_t row_bytes = blocks * kSlotRow * static_cast<int64_t>(sizeof(float));
    tokens = p.m < kMaxTokens ? p.m : kMaxTokens;
    while (tokens > 1 && tokens * row_bytes > kMaxBytes) tokens /= 2;
    x_bytes = static_cast<size_t>(tokens * row_bytes);
    sums_bytes =
        static_cast<size_t>(tokens) * (layout::kAtomsPerBlock + 1) * layout::kAtomRows * kVector * sizeof(float);
  }
};

// Asks for the codes of a row pair one run ahead. An atom is 512 bytes (4 bits) of every 2 KB, a pattern that hardware
// prefetchers give up on. Behind the last run of a slab stands the first run of the next one.
template <class Kind>
static CX_INLINE void prefetch_run(const uint8_t* codes, int g) {
  constexpr int kPairBytes = Kind::Codes::kAtomBytes / kPairs;
  constexpr int64_t kRunBytes = int64_t{kRunBlocks} * layout::kAtomsPerBlock * Kind::Codes::kAtomBytes;
  for (int i = 0; i < kPairBytes; i += 64) __builtin_prefetch(codes + kRunBytes + g * kPairBytes + i, 0, 2);
}

template <class Isa>
static void pack_slots(const GemmProblem& p, int64_t token, int64_t block, float* out) {
  alignas(64) float natural[layout::kBlockK];
  for (int i = 0; i < layout::kBlockK; i += kVector) {
    const int64_t k = block * layout::kBlockK + i;
    Isa::store(natural + i, load_values<Isa>(p.x, token * p.ldx + k, p.dtype, p.weight.k - k));
  }
  typename Isa::F slots[kSlots];
  SlabScales<Isa, Groups::kFlat, false>::to_slots(natural, slots);
  for (int slot = 0; slot < kSlots; ++slot) Isa::store(out + slot * kVector, slots[slot]);
}

// Sums of an atom are [g][token][row g, row g + 8][16]: the tokens of a row pair are one stream, so that a load never
// has the low 12 address bits of a store just before it and waits for it.
static constexpr int64_t sums_offset(int64_t tokens, int64_t token, int g, int row) {
  return ((g * tokens + token) * 2 + row) * kVector;
}

// Adds one atom's products of a run of blocks to `total`, for one token. The 16 rows' sums stay in registers, and the
// scale multiplies the sum over a block instead of every weight.
template <class Kind>
static CX_INLINE void stream_one_token(const typename Kind::Codes& decoder, const typename Kind::Scales& scales,
                                       const uint8_t* codes, int64_t first, int64_t last, int atom, const float* x,
                                       float* total) {
  using Isa = typename Kind::Isa;
  using F = typename Isa::F;
  F sums[layout::kAtomRows];
  for (int i = 0; i < layout::kAtomRows; ++i) sums[i] = Isa::load(total + i * kVector);
  constexpr int64_t kBlockBytes = layout::kAtomsPerBlock * Kind::Codes::kAtomBytes;
  for (int64_t block = first; block < last; ++block, codes += kBlockBytes) {
    F slots[kSlots];
    for (int slot = 0; slot < kSlots; ++slot) slots[slot] = Isa::load(x + block * kSlotRow + slot * kVector);
    unroll<Isa, kPairs>([&](auto pair) __attribute__((always_inline)) {
      constexpr int g = decltype(pair)::value;
      prefetch_run<Kind>(codes, g);
      const auto words = Kind::Codes::load(codes, g);
      unroll<Isa, 2>([&](auto row) __attribute__((always_inline)) {
        constexpr int kRow = decltype(row)::value;
        const int position = Kind::scale_position(atom, g, kRow);
        F sum = Isa::zero();
        unroll<Isa, kSlots>([&](auto slot) __attribute__((always_inline)) {
          constexpr int kSlot = decltype(slot)::value;
          F value = decoder.template value<kRow, kSlot>(words);
          if constexpr (Kind::kZeros) value = Isa::sub(value, scales.row_zero(block, position));
          sum = kSlot == 0 ? Isa::mul(value, slots[0]) : Isa::fma(value, slots[kSlot], sum);
        });
        sums[2 * g + kRow] = Isa::fma(sum, scales.row_scale(block, position), sums[2 * g + kRow]);
      });
    });
  }
  for (int i = 0; i < layout::kAtomRows; ++i) Isa::store(total + i * kVector, sums[i]);
}

// The same for any number of tokens: the weights of a row pair stay in registers, the sums in the L1 cache.
template <class Kind>
static CX_INLINE void stream_tokens(const typename Kind::Codes& decoder, const typename Kind::Scales& scales,
                                    const uint8_t* codes, int64_t first, int64_t last, int atom, const float* x,
                                    int64_t tokens, float* sums, float* total) {
  using Isa = typename Kind::Isa;
  using F = typename Isa::F;
  constexpr int64_t kAtomSums = layout::kAtomRows * kVector;
  constexpr int kPairsAtOnce = Isa::kManyRegisters ? 2 : 1;  // so that a vector of x is loaded for four rows
  constexpr int64_t kBlockBytes = layout::kAtomsPerBlock * Kind::Codes::kAtomBytes;
  for (int64_t i = 0; i < tokens * kAtomSums; i += kVector) Isa::store(sums + i, Isa::zero());
  for (int64_t block = first; block < last; ++block, codes += kBlockBytes) {
    const float* block_x = x + block * tokens * kSlotRow;
    for (int g = 0; g < kPairs; g += kPairsAtOnce) {
      F weights[kPairsAtOnce][2][kSlots];
      for (int pair = 0; pair < kPairsAtOnce; ++pair) {
        prefetch_run<Kind>(codes, g + pair);
        Kind::decode_rows(decoder, scales, codes, block, atom, g + pair, weights[pair]);
      }
      for (int64_t token = 0; token < tokens; ++token) {
        F values[kSlots];
        for (int slot = 0; slot < kSlots; ++slot) values[slot] = Isa::load(block_x + token * kSlotRow + slot * kVector);
        for (int pair = 0; pair < kPairsAtOnce; ++pair) {
          for (int row = 0; row < 2; ++row) {
            float* out = sums + sums_offset(tokens, token, g + pair, row);
            F sum = Isa::load(out);
            for (int slot = 0; slot < kSlots; ++slot) sum = Isa::fma(values[slot], weights[pair][row][slot], sum);
            Isa::store(out, sum);
          }
        }
      }
    }
  }
  for (int64_t i = 0; i < tokens * kAtomSums; i += kVector) {
    Isa::store(total + i, Isa::add(Isa::load(total + i), Isa::load(sums + i)));
  }
}

// Atoms [first_atom, last_atom) of the weight, which may begin and end inside a slab.
template <class Kind>
static void stream_atoms(const GemmProblem& p, const StreamPlan<typename Kind::Isa>& plan, int64_t first_atom,
                         int64_t last_atom, int64_t first_token, int64_t tokens, const float* x, float* totals) {
  using Isa = typename Kind::Isa;
  using F = typename Isa::F;
  const int64_t atom_sums = tokens * layout::kAtomRows * kVector;
  const typename Kind::Codes decoder(p.weight.codebook, p.weight.bias);
  typename Kind::Scales scales(p.weight);
  constexpr int64_t kAtomBytes = Kind::Codes::kAtomBytes;
  while (first_atom < last_atom) {
    const int64_t slab = first_atom / layout::kAtomsPerBlock;
    const int64_t slab_atom = slab * layout::kAtomsPerBlock;
    const int begin = static_cast<int>(first_atom - slab_atom);
    const int end = last_atom - slab_atom < layout::kAtomsPerBlock ? static_cast<int>(last_atom - slab_atom)
                                                                   : layout::kAtomsPerBlock;
    const uint8_t* codes = p.weight.codes + slab * plan.blocks * layout::kAtomsPerBlock * kAtomBytes;
    scales.start_slab(slab);
    for (int64_t i = 0; i < (end - begin) * atom_sums; i += kVector) Isa::store(totals + i, Isa::zero());
    for (int64_t block = 0; block < plan.blocks; block += kRunBlocks) {
      const int64_t block_end = block + kRunBlocks < plan.blocks ? block + kRunBlocks : plan.blocks;
      scales.decode(block, block_end);
      for (int atom = begin; atom < end; ++atom) {
        const uint8_t* atom_codes = codes + (block * layout::kAtomsPerBlock + atom) * kAtomBytes;
        float* total = totals + (atom - begin) * atom_sums;
        if constexpr (Isa::kManyRegisters && Kind::kGroups != Groups::kFlat) {
          if (tokens == 1) {
            stream_one_token<Kind>(decoder, scales, atom_codes, block, block_end, atom, x, total);
            continue;
          }
        }
        stream_tokens<Kind>(decoder, scales, atom_codes, block, block_end, atom, x, tokens,
                            totals + layout::kAtomsPerBlock * atom_sums, total);
      }
    }
    for (int atom = begin; atom < end; ++atom) {
      for (int64_t token = 0; token < tokens; ++token) {
        F rows[layout::kAtomRows];
        const float* total = totals + (atom - begin) * atom_sums;
        for (int row = 0; row < layout::kAtomRows; ++row) {
          rows[row] = Isa::load(total + sums_offset(tokens, token, row % 8, row / 8));
        }
        store_output<Isa>(p, first_token + token, (slab_atom + atom) * layout::kAtomRows, Isa::sums(rows));
      }
    }
    first_atom = slab_atom + end;
  }
}

template <class Isa>
static const char* stream_gemm(const GemmProblem& p) {
  const StreamPlan<Isa> plan(p);
  float* x = static_cast<float*>(p.workspace);
  char* sums = static_cast<char*>(p.workspace) + plan.x_bytes;
  const int64_t atoms = layout::ceil_div(p.weight.n, layout::kAtomRows);
  with_kind<Isa>(p.weight, [&](auto kind) {
    using Kind = decltype(kind);
    for (int64_t first_token = 0; first_token < p.m; first_token += plan.tokens) {
      const int64_t tokens = p.m - first_token < plan.tokens ? p.m - first_token : plan.tokens;
      const int64_t rows = plan.blocks * tokens;
#pragma omp parallel for num_threads(p.threads) if (rows > kSerialRows) schedule(static)
      for (int64_t i = 0; i < rows; ++i) {
        pack_slots<Isa>(p, first_token + i % tokens, i / tokens, x + i * kSlotRow);
      }
#pragma omp parallel for num_threads(p.threads) schedule(static, 1)
      for (int part = 0; part < p.threads; ++part) {
        stream_atoms<Kind>(p, plan, atoms * part / p.threads, atoms * (part + 1) / p.threads, first_token, tokens, x,
                           reinterpret_cast<float*>(sums + part * plan.sums_bytes));
      }
    }
  });
  return nullptr;
}

template <class Isa>
static size_t stream_workspace(const GemmProblem& p) {
  const StreamPlan<Isa> plan(p);
  return plan.x_bytes + static_cast<size_t>(p.threads) * plan.sums_bytes;
}

template <class Isa>
constexpr Instance make_stream_instance(const char* name) {
  return {name,    Device::kCpu,           Family::kStream,   &Isa::available,
          nullptr, &stream_workspace<Isa>, &stream_gemm<Isa>, nullptr};
}

}  // namespace cutlass_ext::cpu
