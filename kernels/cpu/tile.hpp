// y = x @ W^T + bias for many tokens: a tile of the weight is decoded once to fp32 and multiplied with all tokens.
//
// A decoded panel is [k][32 rows], so the register tile (tokens x 32 rows) takes two weight vectors and one broadcast
// per token and k, and needs no sums across a vector. The panel's vectors come from transposing packed words, before
// they are decoded: 64 shuffles give 128 vectors.
#pragma once

#include <cstdint>

#include "kernels/cpu/values.hpp"
#include "kernels/cpu/weight_kind.hpp"
#include "kernels/instance.hpp"

namespace cutlass_ext::cpu {

constexpr int kPanelRows = 2 * layout::kAtomRows;
// K of a tile. The rounding error of a sum over a tile grows with its square root; a panel is 32 KB.
constexpr int kTileK = 256;
constexpr int kTileBlocks = kTileK / layout::kBlockK;
static_assert(kTileBlocks <= kRunBlocks, "one run of scales covers a tile");
// Panels that are decoded before x is read: a tile of 64 KB in the L2 cache. x is read once per tile.
constexpr int kTilePanels = 2;
static_assert(kTilePanels * kPanelRows == layout::kBlockRows, "a tile lies in one slab");

// Tokens shared out to register tiles of nearly equal size: one of 14 and one of 2 tokens would leave the second one
// waiting for its additions.
struct TokenGroups {
  int64_t tokens;
  int64_t count;

  static constexpr TokenGroups of(int64_t tokens, int tile_tokens) {
    return {tokens, layout::ceil_div(tokens, tile_tokens)};
  }
  constexpr int64_t begin(int64_t group) const { return tokens * group / count; }
};

struct TilePlan {
  int64_t blocks;
  int64_t tiles_k;
  int64_t tokens;  // handled in one pass over the weight
  int row_parts;   // the threads: parts of the rows of W times parts of the tokens
  int token_parts;
  size_t x_bytes;
  size_t tile_bytes;  // of a thread
  size_t sums_bytes;  // of a thread
};

template <class Isa>
static TilePlan plan_tile(const GemmProblem& p) {
  TilePlan plan;
  plan.blocks = layout::blocks_along_k(p.weight.k);
  plan.tiles_k = layout::ceil_div(plan.blocks, kTileBlocks);
  // Tokens of a pass over the weight. More of them decode it less often, but their sums and x leave the caches: 4096 x
  // 4096, fp32, M = 4096 takes 587 ms with 512 tokens, 576 with 1024, 601 with 2048 (2 threads of a Cascade Lake,
  // 2026-11-21).
  constexpr int64_t kMaxTokens = 1024;
  constexpr int64_t kMaxBytes = int64_t{16} << 20;
  const int64_t row_bytes = plan.tiles_k * kTileK * static_cast<int64_t>(sizeof(float));
  plan.tokens = p.m < kMaxTokens ? p.m : kMaxTokens;
  while (plan.tokens > 64 && plan.tokens * row_bytes > kMaxBytes) plan.tokens /= 2;
  while (plan.tokens > 1 && plan.tokens * row_bytes > 2 * kMaxBytes) plan.tokens /= 2;
  const int64_t panels = layout::ceil_div(p.weight.n, kPanelRows);
  plan.token_parts = panels >= p.threads ? 1 : static_cast<int>(p.threads / panels);
  const int64_t groups = layout::ceil_div(plan.tokens, Isa::kTileTokens);
  if (plan.token_parts > groups) plan.token_parts = static_cast<int>(groups);
  plan.row_parts = p.threads / plan.token_parts;
  plan.x_bytes = static_cast<size_t>(plan.tokens * row_bytes);
  plan.tile_bytes = sizeof(float) * kTileK * layout::kBlockRows;
  plan.sums_bytes = sizeof(float) * layout::kBlockRows * Isa::kTileTokens *
                    static_cast<size_t>(layout::ceil_div(groups, plan.token_parts));
  return plan;
}

// One k tile of a register tile's tokens: [kTileK][count] fp32, zeros beyond K. The products then read one stream.
template <class Isa>
static void pack_tokens(const GemmProblem& p, int64_t token, int64_t count, int64_t first_k, float* out) {
  static_assert(Isa::kTileTokens <= kVector, "the tokens of a register tile fit into a vector");
  for (int i = 0; i < kTileK; i += kVector) {
    const int64_t left = p.weight.k - first_k - i;
    alignas(64) float rows[kVector][kVector] = {};
    if (left > 0) {
      for (int64_t t = 0; t < count; ++t) {
        Isa::store(rows[t], load_values<Isa>(p.x, (token + t) * p.ldx + first_k + i, p.dtype, left));
      }
    }
    typename Isa::I columns[kVector];
    for (int j = 0; j < kVector; ++j) columns[j] = Isa::load_words(rows[j]);
    Isa::transpose(columns);
    // Whole vectors: what they write beyond their k is overwritten by the next ones, until the end of the tile.
    for (int j = 0; j < kVector; ++j) {
      float* column = out + (i + j) * count;
      memcpy(rows[0], &columns[j], sizeof rows[0]);
      if ((kTileK - i - j) * count >= kVector) {
        Isa::store(column, Isa::load(rows[0]));
      } else {
        for (int64_t t = 0; t < count; ++t) column[t] = rows[0][t];
      }
    }
  }
}

// Rows of a panel in the order of its two vectors: 8 rows of the first atom and the 8 rows in the same place of the
// second one (lanes g of both atoms).
template <class Isa>
static CX_INLINE typename Isa::F panel_rows(const float* packed, int first_atom, int row) {
  alignas(64) float values[kVector];
  for (int i = 0; i < kVector; ++i) {
    values[i] = packed[layout::scale_position((first_atom + i / 8) * layout::kAtomRows + i % 8 + 8 * row)];
  }
  return Isa::load(values);
}

// One block of a panel: 64 k x 32 rows, the rows of atoms first_atom and first_atom + 1.
template <class Kind>
static CX_INLINE void decode_panel(const typename Kind::Codes& decoder, const typename Kind::Scales& scales,
                                   const uint8_t* codes, int64_t block, int first_atom, float* panel) {
  using Isa = typename Kind::Isa;
  using F = typename Isa::F;
  using I = typename Isa::I;
  using Codes = typename Kind::Codes;
  I low[kVector], high[kVector];
  for (int i = 0; i < kVector; ++i) {
    const auto words = Codes::load(codes + i / 8 * Codes::kAtomBytes, i % 8);
    low[i] = words.low;
    high[i] = words.high;
  }
  Isa::transpose(low);
  if constexpr (Codes::kTwoWords) Isa::transpose(high);
  alignas(64) uint32_t low_words[kVector][kVector], high_words[kVector][kVector];
  memcpy(low_words, low, sizeof low_words);
  if constexpr (Codes::kTwoWords) memcpy(high_words, high, sizeof high_words);
  for (int step = 0; step < layout::kSteps; ++step) {
    F scale[2], zero[2];
    for (int row = 0; row < 2; ++row) {
      scale[row] = panel_rows<Isa>(scales.step_scales(block, step), first_atom, row);
      if constexpr (Kind::kZeros) zero[row] = panel_rows<Isa>(scales.step_zeros(block, step), first_atom, row);
    }
    for (int t = 0; t < 4; ++t) {
      const int element = 4 * t + step;
      const I low_word = Isa::load_words(low_words[element]);
      const typename Codes::Words words = {low_word,
                                           Codes::kTwoWords ? Isa::load_words(high_words[element]) : low_word};
      unroll<Isa, kSlots>([&](auto slot) __attribute__((always_inline)) {
        constexpr int kSlot = decltype(slot)::value;
        float* out = panel + slot_k(kSlot, element) * kPanelRows;
        unroll<Isa, 2>([&](auto row) __attribute__((always_inline)) {
          constexpr int kRow = decltype(row)::value;
          F value = decoder.template value<kRow, kSlot>(words);
          if constexpr (Kind::kZeros) value = Isa::sub(value, zero[kRow]);
          Isa::store(out + kRow * kVector, Isa::mul(value, scale[kRow]));
        });
      });
    }
  }
}

// The same where groups are flat: by rows, whose scales change at any k.
template <class Kind>
static void decode_flat_panel(const typename Kind::Codes& decoder, const typename Kind::Scales& scales,
                              const uint8_t* codes, int64_t block, int first_atom, float* panel) {
  using Isa = typename Kind::Isa;
  using F = typename Isa::F;
  for (int pair = 0; pair < 2 * kPairs; ++pair) {
    const int atom = pair / kPairs, g = pair % kPairs;
    F weights[2][kSlots];
    Kind::decode_rows(decoder, scales, codes + atom * Kind::Codes::kAtomBytes, block, first_atom + atom, g, weights);
    for (int row = 0; row < 2; ++row) {
      for (int slot = 0; slot < kSlots; ++slot) {
        alignas(64) float values[kVector];
        Isa::store(values, weights[row][slot]);
        for (int e = 0; e < kVector; ++e) {
          panel[slot_k(slot, e) * kPanelRows + row * kVector + atom * kPairs + g] = values[e];
        }
      }
    }
  }
}

// sums[kTokens][32] (+)= x[depth][kTokens]^T . panel[depth][32].
template <class Isa, int kTokens>
static void multiply_panel(const float* x, const float* panel, int64_t depth, bool first, float* sums) {
  using F = typename Isa::F;
  F acc[kTokens][2];
#pragma GCC unroll 16
  for (int token = 0; token < kTokens; ++token) acc[token][0] = acc[token][1] = Isa::zero();
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    // The panel comes from the L2 cache while x stays in L1, and the next tokens come from L3. Asking for both ahead of
    // time: 142 instead of 152 ms (4096 x 4096, M = 1024, 2 threads of a Cascade Lake, 2026-11-21).
    __builtin_prefetch(panel + (k + 8) * kPanelRows);
    __builtin_prefetch(panel + (k + 8) * kPanelRows + kVector);
    __builtin_prefetch(x + (k + kTileK) * kTokens, 0, 2);
    const F low = Isa::load(panel + k * kPanelRows);
    const F high = Isa::load(panel + k * kPanelRows + kVector);
#pragma GCC unroll 16
    for (int token = 0; token < kTokens; ++token) {
      const F value = Isa::set1(x[k * kTokens + token]);
      acc[token][0] = Isa::fma(value, low, acc[token][0]);
      acc[token][1] = Isa::fma(value, high, acc[token][1]);
    }
  }
#pragma GCC unroll 16
  for (int token = 0; token < kTokens; ++token) {
    for (int half = 0; half < 2; ++half) {
      float* out = sums + token * kPanelRows + half * kVector;
      Isa::store(out, first ? acc[token][half] : Isa::add(acc[token][half], Isa::load(out)));
    }
  }
}

template <class Isa, int kTokens = Isa::kTileTokens>
static CX_INLINE void multiply_panel(int64_t tokens, const float* x, const float* panel, int64_t depth, bool first,
                                     float* sums) {
  if constexpr (kTokens > 1) {
    if (tokens < kTokens) return multiply_panel<Isa, kTokens - 1>(tokens, x, panel, depth, first, sums);
  }
  multiply_panel<Isa, kTokens>(x, panel, depth, first, sums);
}

// Panels [first_panel, last_panel) for tokens [begin, end) of the packed x.
template <class Kind>
static void multiply_tiles(const GemmProblem& p, const TilePlan& plan, int64_t first_panel, int64_t last_panel,
                           int64_t first_token, const TokenGroups& groups, int64_t first_group, int64_t last_group,
                           const float* x, float* tile, float* sums) {
  using Isa = typename Kind::Isa;
  using F = typename Isa::F;
  constexpr int kAtomsPerPanel = kPanelRows / layout::kAtomRows;
  const typename Kind::Codes decoder(p.weight.codebook, p.weight.bias);
  typename Kind::Scales scales(p.weight);
  const int64_t begin = groups.begin(first_group);
  const int64_t end = groups.begin(last_group);
  while (first_panel < last_panel && begin < end) {
    const int64_t slab = first_panel / kTilePanels;
    const int panel_begin = static_cast<int>(first_panel - slab * kTilePanels);
    const int panel_end =
        last_panel - slab * kTilePanels < kTilePanels ? static_cast<int>(last_panel - slab * kTilePanels) : kTilePanels;
    scales.start_slab(slab);
    for (int64_t tile_k = 0; tile_k < plan.tiles_k; ++tile_k) {
      const int64_t block_begin = tile_k * kTileBlocks;
      const int64_t block_end = block_begin + kTileBlocks < plan.blocks ? block_begin + kTileBlocks : plan.blocks;
      scales.decode(block_begin, block_end);
      for (int panel = panel_begin; panel < panel_end; ++panel) {
        for (int64_t block = block_begin; block < block_end; ++block) {
          const int atom = panel * kAtomsPerPanel;
          const uint8_t* codes =
              p.weight.codes + ((slab * plan.blocks + block) * layout::kAtomsPerBlock + atom) * Kind::Codes::kAtomBytes;
          float* out = tile + panel * kTileK * kPanelRows + (block - block_begin) * layout::kBlockK * kPanelRows;
          if constexpr (Kind::kGroups == Groups::kFlat) {
            decode_flat_panel<Kind>(decoder, scales, codes, block, atom, out);
          } else {
            decode_panel<Kind>(decoder, scales, codes, block, atom, out);
          }
        }
      }
      for (int64_t group = first_group; group < last_group; ++group) {
        for (int panel = panel_begin; panel < panel_end; ++panel) {
          const int64_t token = groups.begin(group);
          multiply_panel<Isa>(groups.begin(group + 1) - token, x + (tile_k * groups.tokens + token) * kTileK,
                              tile + panel * kTileK * kPanelRows, (block_end - block_begin) * layout::kBlockK,
                              tile_k == 0, sums + (panel * (end - begin) + token - begin) * kPanelRows);
        }
      }
    }
    for (int panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t n = slab * layout::kBlockRows + panel * kPanelRows;
      for (int64_t token = begin; token < end; ++token) {
        const float* row = sums + (panel * (end - begin) + token - begin) * kPanelRows;
        const F low = Isa::load(row), high = Isa::load(row + kVector);
        store_output<Isa>(p, first_token + token, n, Isa::low_halves(low, high));
        store_output<Isa>(p, first_token + token, n + kVector, Isa::high_halves(low, high));
      }
    }
    first_panel = slab * kTilePanels + panel_end;
  }
}

template <class Isa>
static const char* tile_gemm(const GemmProblem& p) {
  const TilePlan plan = plan_tile<Isa>(p);
  float* x = static_cast<float*>(p.workspace);
  char* buffers = static_cast<char*>(p.workspace) + plan.x_bytes;
  const int64_t panels = layout::ceil_div(p.weight.n, kPanelRows);
  const int parts = plan.row_parts * plan.token_parts;
  with_kind<Isa>(p.weight, [&](auto kind) {
    using Kind = decltype(kind);
    for (int64_t first_token = 0; first_token < p.m; first_token += plan.tokens) {
      const int64_t tokens = p.m - first_token < plan.tokens ? p.m - first_token : plan.tokens;
      const TokenGroups groups = TokenGroups::of(tokens, Isa::kTileTokens);
#pragma omp parallel num_threads(p.threads)
      {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < plan.tiles_k * groups.count; ++i) {
          const int64_t tile_k = i / groups.count;
          const int64_t token = groups.begin(i % groups.count);
          pack_tokens<Isa>(p, first_token + token, groups.begin(i % groups.count + 1) - token, tile_k * kTileK,
                           x + (tile_k * tokens + token) * kTileK);
        }
#pragma omp for schedule(static, 1)
        for (int part = 0; part < parts; ++part) {
          const int64_t row_part = part / plan.token_parts;
          const int64_t token_part = part % plan.token_parts;
          float* tile = reinterpret_cast<float*>(buffers + part * (plan.tile_bytes + plan.sums_bytes));
          multiply_tiles<Kind>(p, plan, panels * row_part / plan.row_parts, panels * (row_part + 1) / plan.row_parts,
                               first_token, groups, groups.count * token_part / plan.token_parts,
                               groups.count * (token_part + 1) / plan.token_parts, x, tile,
                               tile + plan.tile_bytes / sizeof(float));
        }
      }
    }
  });
  return nullptr;
}

template <class Isa>
static size_t tile_workspace(const GemmProblem& p) {
  const TilePlan plan = plan_tile<Isa>(p);
  return plan.x_bytes + static_cast<size_t>(plan.row_parts * plan.token_parts) * (plan.tile_bytes + plan.sums_bytes);
}

template <class Isa>
constexpr Instance make_tile_instance(const char* name) {
  return {name, Device::kCpu, Family::kTile, &Isa::available, nullptr, &tile_workspace<Isa>, &tile_gemm<Isa>, nullptr};
}

}  // namespace cutlass_ext::cpu
