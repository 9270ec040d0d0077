#include "kernels/cuda/stream/plan.hpp"

#include <algorithm>

#include "kernels/cuda/plan_cache.hpp"

namespace cutlass_ext::cuda::stream {
namespace {

constexpr uint32_t align(uint32_t at, uint32_t to) { return (at + to - 1) / to * to; }

int log2_of(int64_t power) {
  int log = 0;
  while ((int64_t{1} << log) < power) ++log;
  return log;
}

// What a launch takes beyond a constant, in ns: reading the weights, x, and the instructions that this does not hide.
// Fitted to 13,800 measured launches of ten shapes (int4, uint4, nf4 and nested nf4, bf16, M = 1..32; H200,
// 2026-11-21): the split it prefers among those that `search` considers is on average 0.3% slower than the best one
// measured, at worst 13% (2048 x 2048, M = 32).
double cost_of(const GemmProblem& problem, const KernelTraits& kernel, const DeviceProperties& device, const Params& p,
               const Plan& plan) {
  constexpr double kMemoryRate = 34;                  // bytes per ns and SM, all SMs reading weights
  constexpr double kCtaRate = 42;                     // the same of a CTA on its own
  constexpr double kXRate = 220;                      // x, which comes from L2
  constexpr double kIssueRate = 9.5;                  // instructions per ns of an SM
  constexpr double kWarps = 9;                        // that it takes to issue at this rate
  constexpr double kCluster[] = {0, 690, 700, 2300};  // of 1, 2, 4, 8 CTAs
  constexpr double kPass = 2750;
  constexpr double kRowWarp = 230;
  const Split& split = plan.split;
  const int atoms = kernel.rows / layout::kAtomRows;
  const int warps = split.row_warps * split.k_warps;
  const double passes = static_cast<double>(layout::ceil_div(p.tiles, plan.clusters));
  const double ctas = double(p.tiles) * split.cluster;                                     // one pass of all tiles
  const double blocks = double(layout::blocks_along_k(problem.weight.k)) / split.cluster;  // of a CTA and unit
  const double weight_bytes =
      blocks * split.row_warps * (atoms * layout::atom_bytes(4) + p.group_scale_bytes + p.group_zero_bytes);
  const double x_bytes = 128 * p.m * blocks * (p.x_resident ? 1 / passes : split.row_warps);
  const double instructions = blocks * split.row_warps * (57 + atoms * (kernel.pair_table ? 118 : 52));
  const double memory = ctas * weight_bytes / (kMemoryRate * device.sms);
  return std::max(memory, passes * weight_bytes / kCtaRate) + ctas * x_bytes / (kXRate * device.sms) +
         passes * instructions / (kIssueRate * std::min(1.0, warps / kWarps)) + kPass * (passes - 1) +
         kRowWarp * split.row_warps + kCluster[log2_of(split.cluster)];
}

}  // namespace

bool plan_split(const GemmProblem& problem, int tokens, const KernelTraits& kernel, const DeviceProperties& device,
                const Split& split, Params* params, Plan* plan) {
  const Weight& w = problem.weight;
  Params& p = *params;
  const int warps = split.row_warps * split.k_warps;
  if (warps > kernel.warps || split.cluster > kMaxCluster || device.active_clusters(split.cluster) == 0) return false;
  const int k_blocks = static_cast<int>(layout::blocks_along_k(w.k));
  const int parts = split.cluster * split.k_warps;
  if (parts > k_blocks) return false;
  p.part_blocks = k_blocks / parts;
  p.part_rest = k_blocks % parts;
  p.units = static_cast<int32_t>(layout::ceil_div(w.n, kernel.rows));
  p.tiles = static_cast<int>(layout::ceil_div(p.units, split.row_warps));
  plan->clusters = std::min(p.tiles, device.active_clusters(split.cluster));
  const bool one_pass = p.tiles <= plan->clusters;
  p.scale_bytes = size_of(w.scale_type);
  p.zero_bytes = zero_size(w.zero_type, w.scale_type);
  const int64_t slab_scales = layout::packed_groups(w.k, w.group_size) * layout::kBlockRows;
  p.slab_code_bytes = static_cast<uint32_t>(k_blocks * layout::block_bytes(4));
  p.slab_scale_bytes = static_cast<uint32_t>(slab_scales * p.scale_bytes);
  p.slab_zero_bytes = static_cast<uint32_t>(slab_scales * p.zero_bytes);
  p.group_shift = w.group_size >= w.k               ? 31
                  : w.group_size <= layout::kBlockK ? 0
                                                    : log2_of(w.group_size / layout::kBlockK);
  const int group_values = kernel.groups * layout::kBlockRows;
  p.group_scale_bytes = static_cast<uint32_t>(group_values * p.scale_bytes);
  p.group_zero_bytes = static_cast<uint32_t>(group_values * p.zero_bytes);
  p.m = tokens;
  uint32_t at = kernel.ring_at;
  const uint32_t ring_bytes = kernel.stages * kernel.stage_bytes;
  at += warps * ring_bytes;
  p.partial_bytes = static_cast<uint32_t>(tokens * kernel.partial_pitch);
  // With one tile a CTA a warp's sums may take the place of its ring.
  if (one_pass && p.partial_bytes <= ring_bytes) {
    p.partial_at = kernel.ring_at;
    p.partial_bytes = ring_bytes;
  } else {
    p.partial_at = at;
    at += warps * p.partial_bytes;
  }
  p.resolved_at = at = align(at, 16);
  if (kernel.resolves) at += warps * group_values * 4 * (p.zero_bytes != 0 ? 2 : 1);
  p.nested_map_at = at;
  if (kernel.resolves && w.scale_type == ScaleType::kNested) at += kNestedMapSize * 4;
  p.barriers = at = align(at, 8);
  at += 8 * 2;
  p.exchange_at = at = align(at, 16);
  p.exchange_bytes = split.cluster > 1 ? split.row_warps * kernel.rows * tokens * 4 : 0;
  at += p.exchange_bytes * (one_pass ? 1 : 2);
  p.x_at = at = align(at, 16);
  const uint32_t limit = static_cast<uint32_t>(device.shared_bytes) + (device.clusters ? kSharedBase : 0);
  const int cta_blocks = split.k_warps * p.part_blocks + std::min(split.k_warps, p.part_rest);
  const int64_t resident = int64_t{tokens} * (cta_blocks * layout::kBlockK * 2 + kernel.x_padding);
  // Read once, x is better loaded block by block: all at once it delays the weights behind it.
  p.x_resident = at + resident <= limit && (tokens <= 4 || split.row_warps > 1 || !one_pass);
  if (p.x_resident) {
    p.x_step = layout::kBlockK * 2;
    p.x_pitch = cta_blocks * p.x_step + kernel.x_padding;
    at += static_cast<uint32_t>(resident);
  } else {
    // The first stages' x is that of the first tile only.
    if (!one_pass && p.part_blocks < kernel.stages) return false;
    p.x_pitch = layout::kBlockK * 2 + kernel.x_padding;
    p.x_step = tokens * p.x_pitch;
    at += warps * kernel.stages * p.x_step;
  }
  if (at > limit) return false;
  plan->split = split;
  plan->shared_bytes = static_cast<int>(device.clusters ? at - kSharedBase : at);
  return true;
}

namespace {

// Over splits with a power of two of warps along K: as many as there are and K has blocks for, and half of that (others
// were never faster); `fewer` divides them, for devices whose shared memory does not hold the rings of so many.
const Compiled* search(const GemmProblem& problem, int tokens, const Candidates& candidates,
                       const DeviceProperties& device, int fewer, Params* params, Plan* plan) {
  const Compiled* best = nullptr;
  double best_cost = 0;
  const Params start = *params;
  const int blocks = static_cast<int>(layout::blocks_along_k(problem.weight.k));
  const auto consider = [&](const Compiled& kernel, const Split& split) {
    Params p = start;
    Plan candidate;
    if (!plan_split(problem, tokens, kernel.traits, device, split, &p, &candidate)) return;
    const double cost = cost_of(problem, kernel.traits, device, p, candidate);
    if (best != nullptr && cost >= best_cost) return;
    best = &kernel;
    best_cost = cost;
    *params = p;
    *plan = candidate;
  };
  for (int i = 0; i < candidates.count; ++i) {
    const Compiled& kernel = candidates.kernels[i];
    for (int cluster = 1; cluster <= kMaxCluster; cluster *= 2) {
      for (int row_warps = 1; row_warps <= kernel.traits.warps; ++row_warps) {
        const int most = std::min(kernel.traits.warps / row_warps, blocks / cluster) / fewer;
        if (most == 0) continue;
        int k_warps = 1;
        while (2 * k_warps <= most) k_warps *= 2;
        consider(kernel, {cluster, row_warps, k_warps});
        if (k_warps > 1) consider(kernel, {cluster, row_warps, k_warps / 2});
      }
    }
  }
  return best;
}

}  // namespace

const Compiled* choose_plan(const GemmProblem& problem, int tokens, const Candidates& candidates,
                            const DeviceProperties& device, Params* params, Plan* plan) {
  return choose_once<Split>(
      problem.weight, tokens, candidates, device,
      [&](const Compiled& kernel, const Split& split) {
        return plan_split(problem, tokens, kernel.traits, device, split, params, plan);
      },
      [&](Split* split) {
        const Compiled* kernel = nullptr;
        for (int fewer = 1; kernel == nullptr && fewer <= kMaxWarps; fewer *= 2) {
          kernel = search(problem, tokens, candidates, device, fewer, params, plan);
        }
        if (kernel != nullptr) *split = plan->split;
        return kernel;
      });
}

}  // namespace cutlass_ext::cuda::stream
