#include "kernels/cuda/wgmma/plan.hpp"

#include <algorithm>

#include "kernels/cuda/plan_cache.hpp"
#include "kernels/decode.hpp"

namespace cutlass_ext::cuda::wgmma {
namespace {

constexpr uint32_t kCodebookBytes = 2 * kCodebookSize;  // low bytes, high bytes

constexpr int kUnits = 16;  // of 16 tokens in the largest tile

constexpr uint32_t align(uint32_t at, uint32_t to) { return (at + to - 1) / to * to; }

int log2_of(int64_t power) {
  int log = 0;
  while ((int64_t{1} << log) < power) ++log;
  return log;
}

// A 64-k block of K in a CTA takes so many ns.
struct BlockTime {
  int tokens, row_tiles, warpgroups, k_warpgroups;
  double integers, codebooks;
};

// What a launch takes, in ns. Fitted to measured launches of tiles and splits: int4 g64 and nf4, bf16, six weights, M =
// 32..1024 (experiments/wgmma_tiles; H200, 2026-11-21).
double cost_of(const KernelTraits& kernel, const Split& split, const Params& p) {
  constexpr BlockTime kTimes[] = {
      {32, 1, 1, 1, 131, 180},  {32, 1, 1, 2, 135, 156},  {32, 1, 1, 3, 149, 159},  {32, 1, 1, 4, 152, 157},
      {32, 1, 2, 1, 199, 243},  {32, 1, 2, 2, 204, 228},  {32, 1, 3, 1, 250, 310},  {32, 1, 4, 1, 319, 394},
      {64, 1, 1, 1, 156, 195},  {64, 1, 1, 2, 154, 174},  {64, 1, 1, 3, 157, 185},  {64, 1, 1, 4, 157, 185},
      {64, 1, 2, 1, 245, 288},  {64, 1, 2, 2, 242, 286},  {64, 1, 3, 1, 290, 350},  {64, 1, 4, 1, 368, 490},
      {128, 1, 1, 1, 200, 320}, {128, 1, 1, 2, 228, 310}, {128, 1, 1, 3, 293, 369}, {128, 1, 2, 1, 337, 490},
      {128, 1, 3, 1, 490, 690}, {128, 2, 1, 1, 375, 600}, {128, 2, 2, 1, 655, 950}, {256, 1, 1, 1, 340, 436},
      {256, 1, 1, 2, 500, 560}, {256, 1, 2, 1, 660, 708}};
  const BlockTime* time = kTimes;
  while (time->tokens != kernel.tokens || time->row_tiles != kernel.row_tiles || time->warpgroups != split.warpgroups ||
         time->k_warpgroups != split.k_warpgroups) {
    ++time;
  }
  const double scaling = kernel.table || kernel.fused ? 1 : kernel.fine ? 1.3 : 1.03;
  const double block = (kernel.table ? time->codebooks : time->integers) * scaling;
  const double blocks = kernel.blocks * (p.part_chunks + (p.part_rest > 0 ? 1 : 0));
  const double sums = double(kernel.tokens) * p.slabs_per_cta;  // in units of 64 rows
  const double passes = static_cast<double>(layout::ceil_div(int64_t{p.row_tiles} * p.token_tiles, p.clusters));
  const double output = 500 + 3 * sums;  // of a tile that another one follows
  const double exchange = p.cluster > 1 ? 1100 + 5 * sums + (p.cluster - 2) * (100 + 3.5 * sums) : 0;
  const double warpgroup_sums = (split.k_warpgroups - 1) * 0.9 * sums;
  return 3400 + passes * (blocks * block + exchange) + (passes - 1) * output + 0.5 * sums + warpgroup_sums;
}

}  // namespace

bool plan_split(const GemmProblem& problem, const KernelTraits& kernel, const DeviceProperties& device,
                const Split& split, Params* params, Plan* plan) {
  const Weight& w = problem.weight;
  Params& p = *params;
  const int chunks = static_cast<int>(layout::ceil_div(layout::blocks_along_k(w.k), kernel.blocks));
  if (split.warpgroups * split.k_warpgroups > kernel.warpgroups || split.cluster > kMaxCluster) return false;
  if (split.cluster * split.k_warpgroups > chunks || (split.k_warpgroups > 1 && kernel.row_tiles > 1)) return false;
  if (device.active_clusters(split.cluster) == 0) return false;
  p.cluster = split.cluster;
  p.slabs_per_cta = split.warpgroups * kernel.row_tiles;
  p.k_warpgroups = split.k_warpgroups;
  p.sources = split.cluster * split.k_warpgroups;
  p.units_of_first_source = 0;
  for (int unit = 0; unit < kUnits; unit += p.sources) p.units_of_first_source |= 1u << unit;
  p.slabs = static_cast<int32_t>(layout::slabs(w.n));
  p.part_chunks = chunks / split.cluster;
  p.part_rest = chunks % split.cluster;
  p.row_tiles = static_cast<int32_t>(layout::ceil_div(p.slabs, p.slabs_per_cta));
  p.token_tiles = static_cast<int32_t>(layout::ceil_div(problem.m, kernel.tokens));
  // Tiles of equal size rather than a last one that reaches beyond M: what a copy fills with zeros takes longer than
  // what it reads (4096 x 4096, tiles of 128 tokens: M = 96 14.3 us, M = 128 12.2; H200, 2026-11-21).
  p.tile_tokens = static_cast<int32_t>(layout::ceil_div(problem.m, p.token_tiles));
  const int64_t tiles = int64_t{p.row_tiles} * p.token_tiles;
  if (tiles > INT32_MAX) return false;
  p.clusters = static_cast<int32_t>(std::min<int64_t>(tiles, device.active_clusters(split.cluster)));
  // Warpgroups along K leave their sums in the ring, where the next tile's chunks would come.
  if (split.k_warpgroups > 1 && tiles > p.clusters) return false;
  p.scale_bytes = size_of(w.scale_type);
  p.zero_bytes = zero_size(w.zero_type, w.scale_type);
  const bool one_group = w.group_size >= w.k;
  const int64_t chunk_k = kernel.blocks * layout::kBlockK;
  p.groups_in_chunk = one_group || w.group_size >= chunk_k ? 1 : static_cast<int32_t>(chunk_k / w.group_size);
  p.group_steps = static_cast<int32_t>(chunk_k) / layout::kStepK / p.groups_in_chunk;
  p.group_shift = one_group ? 31 : w.group_size <= chunk_k ? 0 : log2_of(w.group_size / chunk_k);
  if (kernel.fused && w.zero_type != ZeroType::kNone) return false;
  const int group_values = p.groups_in_chunk * layout::kBlockRows;
  p.group_scale_bytes = static_cast<uint32_t>(group_values * p.scale_bytes);
  p.group_zero_bytes = static_cast<uint32_t>(group_values * p.zero_bytes);
  p.group_scale_pieces = static_cast<int32_t>(p.group_scale_bytes) / kPieceBytes;
  p.group_zero_pieces = static_cast<int32_t>(p.group_zero_bytes) / kPieceBytes;
  p.has_rest = w.zero_type == ZeroType::kFloat && float_type(w.scale_type) != problem.dtype;
  if (kernel.fine != (p.groups_in_chunk > kernel.blocks || p.has_rest)) return false;
  // A stage.
  const uint32_t x_bytes = static_cast<uint32_t>(kernel.blocks * kernel.tokens * layout::kBlockK * 2);
  p.codes_at = x_bytes;
  p.scales_at = p.codes_at + p.slabs_per_cta * kernel.blocks * layout::block_bytes(4);
  p.zeros_at = p.scales_at + p.slabs_per_cta * p.group_scale_bytes;
  p.resolved_at = p.zeros_at + p.slabs_per_cta * p.group_zero_bytes;
  p.copy_bytes = p.resolved_at - x_bytes / kernel.tokens * (kernel.tokens - p.tile_tokens);
  p.resolved_bytes = static_cast<uint32_t>(p.slabs_per_cta * group_values * 2);
  const int kinds = !kernel.table && p.has_rest ? 4 : 2;
  p.stage_bytes = align(p.resolved_at + kinds * p.resolved_bytes, kSharedAlignment);
  // What lies behind the ring.
  const uint32_t output_bytes = static_cast<uint32_t>(split.warpgroups * split.k_warpgroups * kernel.output_bytes);
  const uint32_t map_bytes = w.scale_type == ScaleType::kNested ? kNestedMapSize * 4 : 0;
  const uint32_t barrier_bytes = kMaxStages * 3 * 8;
  const uint32_t rest = output_bytes + kCodebookBytes + map_bytes + barrier_bytes;
  p.ring_at = kernel.pair_table ? kPairTableBytes : 0;
  const uint32_t limit = static_cast<uint32_t>(device.shared_bytes) - p.ring_at;
  if (limit < rest + std::max(2, split.k_warpgroups) * p.stage_bytes) return false;
  p.stages = static_cast<int32_t>(std::min<uint32_t>((limit - rest) / p.stage_bytes, kMaxStages));
  uint32_t at = p.ring_at + p.stages * p.stage_bytes;
  // Parts of K leave their sums in the ring.
  const int sums = split.cluster > 1 || split.k_warpgroups > 1 ? split.k_warpgroups : 0;
  const int sum_bytes = p.slabs_per_cta * layout::kBlockRows * kernel.tokens * 4;
  at = std::max(at, p.ring_at + static_cast<uint32_t>(sums * sum_bytes));
  p.output_at = at = align(at, 128);
  at += output_bytes;
  p.codebook_at = at;
  at += kCodebookBytes;
  p.nested_map_at = at;
  at += map_bytes;
  p.barriers_at = at;
  at += barrier_bytes;
  if (at > static_cast<uint32_t>(device.shared_bytes)) return false;
  plan->split = split;
  plan->clusters = p.clusters;
  plan->threads = (split.warpgroups * split.k_warpgroups + 1) * kWarpgroupThreads;
  plan->shared_bytes = static_cast<int>(at);
  plan->chunk_blocks = kernel.blocks;
  return true;
}

namespace {

const Compiled* search(const GemmProblem& problem, const Candidates& candidates, const DeviceProperties& device,
                       Params* params, Plan* plan) {
  const Compiled* best = nullptr;
  double best_cost = 0;
  const Params start = *params;
  for (int i = 0; i < candidates.count; ++i) {
    const Compiled& kernel = candidates.kernels[i];
    for (int warpgroups = 1; warpgroups <= kernel.traits.warpgroups; ++warpgroups) {
      for (int k_warpgroups = 1; warpgroups * k_warpgroups <= kernel.traits.warpgroups; ++k_warpgroups) {
        for (int cluster = 1; cluster <= kMaxCluster; ++cluster) {
          Params p = start;
          Plan candidate;
          const Split split{warpgroups, k_warpgroups, cluster};
          if (!plan_split(problem, kernel.traits, device, split, &p, &candidate)) continue;
          const double cost = cost_of(kernel.traits, split, p);
          if (best != nullptr && cost >= best_cost) continue;
          best = &kernel;
          best_cost = cost;
          *params = p;
          *plan = candidate;
        }
      }
    }
  }
  return best;
}

}  // namespace

const Compiled* choose_plan(const GemmProblem& problem, const Candidates& candidates, const DeviceProperties& device,
                            Params* params, Plan* plan) {
  return choose_once<Split>(
      problem.weight, problem.m, candidates, device,
      [&](const Compiled& kernel, const Split& split) {
        return plan_split(problem, kernel.traits, device, split, params, plan);
      },
      [&](Split* split) {
        const Compiled* kernel = search(problem, candidates, device, params, plan);
        if (kernel != nullptr) *split = plan->split;
        return kernel;
      });
}

}  // namespace cutlass_ext::cuda::wgmma
