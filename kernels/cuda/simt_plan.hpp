// How the simt family shares out a problem. Plain C++.
//
// A warp works on units: 32 rows (two atoms) x one 64-k block. A block of threads has 8 warps: `row_warps` of them on
// rows beside each other, the rest on other k blocks; a cluster of blocks shares the k blocks once more.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/layout.hpp"
#include "kernels/problem.hpp"

namespace cutlass_ext::cuda {

constexpr int kSimtWarps = 8;
constexpr int kSimtUnitAtoms = 2;
constexpr int kSimtUnitRows = kSimtUnitAtoms * layout::kAtomRows;
constexpr int kSimtMaxCluster = 8;  // the portable limit

// Units a warp has requested ahead: at 4 bits 1.2 KB each, so 55 KB of a thread block, of which an SM holds two. Fewer
// where a device has too little shared memory.
constexpr int simt_stages(int bits) { return bits == 8 ? 4 : 6; }
constexpr int kSimtFewStages = 4;
// Whether there is such a device, with groups of 16 or 32: 4 bits have the largest table, and zeros; more tokens run on
// larger devices only.
constexpr bool simt_may_have_few_stages(int bits, int tokens) { return bits == 4 && tokens <= 4; }

// Tokens of the largest tile: eight may take more shared memory than sm_86, sm_89 and sm_120 have, 99 KB.
constexpr int simt_most_tokens(int device_bytes) { return device_bytes < (128 << 10) ? 4 : 8; }

// The lookup table of a codebook (simt_codes.cuh): for up to 4 bits of pairs of codes.
constexpr int simt_table_bytes(bool codebook, int bits) { return codebook ? 128 << (bits <= 4 ? 2 * bits : bits) : 0; }

// Of sums at the end: those of all warps, then those of the thread block.
constexpr int simt_sum_bytes(int tokens, int tile_rows) {
  return tokens * (kSimtWarps * kSimtUnitRows + tile_rows) * static_cast<int>(sizeof(float));
}

// Shared memory of a thread block: the table, the map of nested scales, the warps' rings, x; x later makes room for
// sums. In a stage of a ring: a unit's codes, scales, zeros and second-level absmax as they are stored; behind the
// stages of a warp, scales and zeros as fp32. The values of a group are ordered [g][row g + 8j]: value l belongs to row
// l / 4 + 8 * (l % 4) of the unit, and a lane's four rows are one 16-byte load.
struct SimtMemory {
  int map, warps, x;
  int warp_bytes;
  // In a warp's part.
  int stages, stage_bytes;
  int decoded_scales;  // 0: the stage's are fp32
  int decoded_zeros;   // 0: none
  // In a stage.
  int scales, zeros, second;
};

static inline SimtMemory simt_memory(const Weight& w, int groups, int stages) {
  constexpr int kUnitValues = kSimtUnitRows * static_cast<int>(sizeof(float));
  const int values = w.flat_scales ? 0 : groups * kSimtUnitRows, floats = groups * kUnitValues;
  const bool nested = w.scale_type == ScaleType::kNested;
  const auto in_pieces = [](int bytes) { return (bytes + 15) / 16 * 16; };
  SimtMemory at{};
  at.scales = kSimtUnitAtoms * layout::atom_bytes(w.bits);
  at.zeros = at.scales + in_pieces(values * size_of(w.scale_type));
  at.second = at.zeros + in_pieces(values * zero_size(w.zero_type, w.scale_type));
  at.stage_bytes = at.second + (nested && values > 0 ? floats : 0);
  at.stages = stages;
  at.warp_bytes = stages * at.stage_bytes;
  if (values > 0 && w.scale_type != ScaleType::kFp32) at.decoded_scales = at.warp_bytes, at.warp_bytes += floats;
  if (values > 0 && w.zeros != nullptr) at.decoded_zeros = at.warp_bytes, at.warp_bytes += floats;
  at.map = simt_table_bytes(w.is_codebook, w.bits);
  at.warps = at.map + (nested ? kNestedMapSize * static_cast<int>(sizeof(float)) : 0);
  at.x = at.warps + kSimtWarps * at.warp_bytes;
  return at;
}

// With the most stages that leave room for the smallest chunk of x and the largest tile's sums.
static inline SimtMemory simt_memory(const Weight& w, int groups, int tokens, int device_bytes) {
  const int rest = std::max(kSimtWarps * layout::kBlockK * tokens * static_cast<int>(sizeof(float)),
                            simt_sum_bytes(tokens, kSimtWarps * kSimtUnitRows));
  const SimtMemory most = simt_memory(w, groups, simt_stages(w.bits));
  return most.x + rest <= device_bytes ? most : simt_memory(w, groups, kSimtFewStages);
}

struct SimtPlan {
  int row_warps;     // 1, 2, 4 or 8
  int cluster;       // 1, 2, 4 or 8
  int chunk_blocks;  // k blocks of x in shared memory at a time, a multiple of kSimtWarps
  int64_t row_tiles;
  int64_t token_tiles;

  constexpr int k_warps() const { return kSimtWarps / row_warps; }
  constexpr int tile_rows() const { return row_warps * kSimtUnitRows; }
  int64_t thread_blocks() const { return row_tiles * token_tiles * cluster; }
};

// What a plan takes, in cycles. The numbers describe times of all 16 plans for nf4 on an H200 (1024 x 4096, 4096 x
// 4096, 4096 x 14336, 28672 x 4096; M = 1 and 8; 2026-11-21). An SM's thread blocks run two at a time; a unit of one of
// 16 warps waits for the others' instructions, one of 8 for its own.
static inline double simt_cycles(const SimtPlan& plan, int64_t blocks_of_k, int tile_tokens, int sms) {
  const double warp_units = static_cast<double>(layout::ceil_div(blocks_of_k, plan.k_warps()));
  const double alone = 760 + 440 * tile_tokens, pair = std::max<double>(alone, 16 * (104 + 27 * tile_tokens));
  const double x_cycles = static_cast<double>(blocks_of_k * layout::kBlockK * tile_tokens * 4) / 24;
  const double start = 6000 + x_cycles + (plan.cluster == 1 ? 0 : plan.cluster < 4 ? 1800 : 3000);
  // Clusters of 4 and more fill SMs by two, and leave out an eleventh of them: a cluster lies within one GPC, and of an
  // H200's 132 SMs clusters of 4 and of 8 find room on 120.
  const int64_t places = plan.cluster < 4 ? sms : sms - sms / 11;
  const int64_t per_sm = std::max<int64_t>(plan.cluster < 4 ? 1 : 2, layout::ceil_div(plan.thread_blocks(), places));
  return static_cast<double>(per_sm / 2) * (start + warp_units * pair) +
         static_cast<double>(per_sm % 2) * (start + warp_units * alone);
}

// The fastest of the 16 plans. `x_bytes`: of shared memory for x.
static inline SimtPlan plan_simt(int64_t m, int64_t n, int64_t k, int tile_tokens, int x_bytes, int sms,
                                 bool clusters) {
  const int64_t blocks = layout::blocks_along_k(k);
  const int64_t strips = layout::ceil_div(n, kSimtUnitRows), token_tiles = layout::ceil_div(m, tile_tokens);
  SimtPlan best{};
  double fewest = 0;
  for (int cluster = 1; cluster <= (clusters ? kSimtMaxCluster : 1); cluster *= 2) {
    const int64_t blocks_of_k = layout::ceil_div(blocks, cluster);
    for (int row_warps = 1; row_warps <= kSimtWarps; row_warps *= 2) {
      const SimtPlan plan{row_warps, cluster, 0, layout::ceil_div(strips, row_warps), token_tiles};
      const double cycles = simt_cycles(plan, blocks_of_k, tile_tokens, sms);
      if (best.cluster == 0 || cycles < fewest) best = plan, fewest = cycles;
    }
  }
  const int64_t most =
      x_bytes / (layout::kBlockK * tile_tokens * static_cast<int>(sizeof(float))) / kSimtWarps * kSimtWarps;
  const int64_t wanted = layout::ceil_div(layout::ceil_div(blocks, best.cluster), kSimtWarps) * kSimtWarps;
  best.chunk_blocks = static_cast<int>(std::max<int64_t>(kSimtWarps, std::min(most, wanted)));
  return best;
}

}  // namespace cutlass_ext::cuda
