// How the simt family shares out a problem. Plain C++.
//
// A warp works on units: 32 rows (two atoms) x one 64-k block. A block of threads has 8 warps: `row_warps` of them on
// rows beside each other, the rest on other k blocks; a cluster of blocks shares the k blocks once more.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/layout.hpp"

namespace cutlass_ext::cuda {

constexpr int kSimtWarps = 8;
constexpr int kSimtUnitAtoms = 2;
constexpr int kSimtUnitRows = kSimtUnitAtoms * layout::kAtomRows;
constexpr int kSimtMaxCluster = 8;  // the portable limit

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
