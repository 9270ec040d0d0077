#include "kernels/cuda/transposed/plan.hpp"

#include <algorithm>

#include "kernels/cuda/plan_cache.hpp"

namespace cutlass_ext::cuda::transposed {
namespace {

constexpr uint32_t align(uint32_t at, uint32_t to) { return (at + to - 1) / to * to; }

int log2_of(int64_t power) {
  int log = 0;
  while ((int64_t{1} << log) < power) ++log;
  return log;
}

// Whether a floating-point zero point has x's type.
bool zeros_as_x(const GemmProblem& problem) {
  const ScaleType type = problem.weight.scale_type;
  return type == (problem.dtype == DType::kFp16 ? ScaleType::kFp16 : ScaleType::kBf16);
}

// What a launch takes beyond a constant, in ns. Fitted by eye to 200 launches of five shapes (int4 and nf4, bf16, M =
// 1, 16, 32, 64; H200, 2026-11-21).
double cost_of(const KernelTraits& kernel, const DeviceProperties& device, const Params& p, const Plan& plan) {
  constexpr double kMemoryRate = 34, kXRate = 100;  // bytes per ns and SM; x comes from L2
  constexpr double kIssueRate = 5.5;                // instructions per ns of an SM
  constexpr double kWarps = 12;                     // that it takes to issue at this rate
  constexpr double kPass = 1000, kTokenOfPass = 40, kCluster = 100;
  const Split& split = plan.split;
  const int warps = split.columns * split.rows;
  const double passes =
      static_cast<double>(layout::ceil_div(plan.ctas / split.cluster, device.active_clusters(split.cluster)));
  // All rows of warps take as long as the one with the most slabs.
  const double blocks = double(p.part_slabs + (p.part_rest > 0 ? 1 : 0)) * warps;
  const double bytes = layout::block_bytes(4) + p.group_scale_bytes + p.group_zero_bytes;
  const double instructions = 400 + (kernel.pair_table ? 180 : kernel.table ? 280 : 0) + 60 * (kernel.tokens / 8);
  const double block =
      std::max(bytes / kMemoryRate + 128 * p.m / kXRate, instructions / (kIssueRate * std::min(1.0, warps / kWarps)));
  return passes * (blocks * block + kPass + kTokenOfPass * p.m) + (split.cluster > 1 ? kCluster : 0);
}

}  // namespace

bool plan_split(const GemmProblem& problem, int tokens, const KernelTraits& kernel, const DeviceProperties& device,
                const Split& split, Params* params, Plan* plan) {
  const Weight& w = problem.weight;
  Params& p = *params;
  const int64_t slabs = layout::slabs(w.n), columns = layout::blocks_along_k(w.k);
  const int parts = split.cluster * split.rows, warps = split.columns * split.rows;
  if (tokens > kernel.tokens || warps > kernel.warps || parts > slabs) return false;
  if (split.cluster > kMaxCluster || device.active_clusters(split.cluster) == 0) return false;
  if (kernel.fused && w.zero_type != ZeroType::kNone) return false;
  p.has_rest = w.zero_type == ZeroType::kFloat && !zeros_as_x(problem);
  const bool one_group = w.group_size >= w.k;
  p.groups_in_chunk =
      one_group || w.group_size >= layout::kBlockK ? 1 : static_cast<int32_t>(layout::kBlockK / w.group_size);
  if (kernel.fine != (p.groups_in_chunk > 1 || p.has_rest)) return false;
  p.group_steps = layout::kSteps / p.groups_in_chunk;
  p.group_shift = one_group ? 31 : w.group_size <= layout::kBlockK ? 0 : log2_of(w.group_size / layout::kBlockK);
  p.m = tokens;
  p.cluster = split.cluster;
  p.columns_log = log2_of(split.columns);
  p.k_blocks = static_cast<int32_t>(columns);
  p.part_slabs = static_cast<int32_t>(slabs / parts);
  p.part_rest = static_cast<int32_t>(slabs % parts);
  const int scale_bytes = size_of(w.scale_type), zero_bytes = zero_size(w.zero_type, w.scale_type);
  const int64_t slab_scales = layout::packed_groups(w.k, w.group_size) * layout::kBlockRows;
  p.slab_code_bytes = columns * layout::block_bytes(4);
  p.slab_scale_bytes = slab_scales * scale_bytes;
  p.slab_zero_bytes = slab_scales * zero_bytes;
  const int group_values = p.groups_in_chunk * layout::kBlockRows;
  p.group_scale_bytes = static_cast<uint32_t>(group_values * scale_bytes);
  p.group_zero_bytes = static_cast<uint32_t>(group_values * zero_bytes);
  p.scales_at = layout::block_bytes(4);
  p.zeros_at = p.scales_at + p.group_scale_bytes;
  p.resolved_at = p.zeros_at + p.group_zero_bytes;
  p.resolved_bytes = static_cast<uint32_t>(group_values * 2);
  p.x_at = p.resolved_at + (!kernel.table && p.has_rest ? 4 : 2) * p.resolved_bytes;
  p.stage_bytes = align(p.x_at + static_cast<uint32_t>(tokens * kXPitch), 128);
  p.nested_map_at = kSharedBase + (kernel.pair_table ? kPairTableBytes : 0);
  p.ring_at = p.nested_map_at + (w.scale_type == ScaleType::kNested ? kNestedMapSize * 4 : 0);
  // In the end sums take the place of the rings.
  static_assert(kStages * kXPitch >= kSumPitch);
  const uint32_t end = p.ring_at + warps * kStages * p.stage_bytes;
  plan->shared_bytes = static_cast<int>(device.clusters ? end - kSharedBase : end);
  plan->split = split;
  plan->ctas = layout::ceil_div(columns, split.columns) * split.cluster;
  return plan->shared_bytes <= device.shared_bytes && plan->ctas <= INT32_MAX;
}

namespace {

const Compiled* search(const GemmProblem& problem, int tokens, const Candidates& candidates,
                       const DeviceProperties& device, Params* params, Plan* plan) {
  constexpr int kRows[] = {16, 12, 10, 8, 6, 5, 4, 3, 2, 1};
  const Compiled* best = nullptr;
  double best_cost = 0;
  const Params start = *params;
  const auto consider = [&](const Compiled& kernel, const Split& split) {
    Params p = start;
    Plan candidate;
    if (!plan_split(problem, tokens, kernel.traits, device, split, &p, &candidate)) return;
    const double cost = cost_of(kernel.traits, device, p, candidate);
    if (best != nullptr && cost >= best_cost) return;
    best = &kernel;
    best_cost = cost;
    *params = p;
    *plan = candidate;
  };
  // In the order of their tokens, those with the fewest instructions first.
  for (int i = 0; i < candidates.count && best == nullptr; ++i) {
    for (int cluster = 1; cluster <= kMaxCluster; ++cluster) {
      for (int columns = 1; columns <= kMaxColumns; columns *= 2) {
        for (const int rows : kRows) consider(candidates.kernels[i], {cluster, columns, rows});
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
        const Compiled* kernel = search(problem, tokens, candidates, device, params, plan);
        if (kernel != nullptr) *split = plan->split;
        return kernel;
      });
}

}  // namespace cutlass_ext::cuda::transposed
