#include "kernels/cuda/stream/plan.hpp"

#include <algorithm>

namespace cutlass_ext::cuda::stream {
namespace {

constexpr uint32_t align(uint32_t at, uint32_t to) { return (at + to - 1) / to * to; }


int log2_of(int64_t power) {
  int log = 0;
  while ((int64_t{1} << log) < power) ++log;
  return log;
}

}  // namespace

bool plan_split(const GemmProblem& problem, int tokens, const KernelTraits& kernel, const DeviceProperties& device,
                const Split& split, Params* params, Plan* plan) {
  const Weight& w = problem.weight;
  Params& p = *params;
  const int warps = split.row_warps * split.k_warps;
  if (warps > kMaxWarps || split.cluster > kMaxCluster || device.active_clusters(split.cluster) == 0) return false;
  const int k_blocks = static_cast<int>(layout::blocks_along_k(w.k));
  const int parts = split.cluster * split.k_warps;
  if (parts > k_blocks) return false;
  p.row_warps = split.row_warps;
  p.row_warps_inverse = 256 / split.row_warps + (256 % split.row_warps != 0);
  p.k_warps = split.k_warps;
  p.cluster = split.cluster;
  p.cluster_shift = log2_of(split.cluster);
  p.part_blocks = k_blocks / parts;
  p.part_rest = k_blocks % parts;
  p.units = static_cast<int32_t>(layout::ceil_div(w.n, kernel.rows));
  const int tiles = static_cast<int>(layout::ceil_div(p.units, split.row_warps));
  p.clusters = std::min(tiles, device.active_clusters(split.cluster));
  const int passes = static_cast<int>(layout::ceil_div(tiles, p.clusters));
  // A warp keeps its place in the slab from tile to tile.
  const int units_per_slab = layout::kBlockRows / kernel.rows;
  if (passes > 1 && p.clusters * split.row_warps % units_per_slab != 0) return false;
  p.pass_slabs = passes > 1 ? p.clusters * split.row_warps / units_per_slab : static_cast<int>(layout::slabs(w.n));

  p.scale_bytes = size_of(w.scale_type);
  p.zero_bytes = zero_size(w.zero_type, w.scale_type);
  const int64_t slab_scales = layout::packed_groups(w.k, w.group_size) * layout::kBlockRows;
  p.slab_code_bytes = static_cast<uint32_t>(k_blocks * layout::block_bytes(4));
  p.slab_scale_bytes = static_cast<uint32_t>(slab_scales * p.scale_bytes);
  p.slab_zero_bytes = static_cast<uint32_t>(slab_scales * p.zero_bytes);
  p.group_shift = w.group_size >= w.k ? 31 : w.group_size <= layout::kBlockK ? 0 : log2_of(w.group_size / layout::kBlockK);
  const int group_values = kernel.groups * layout::kBlockRows;
  p.group_scale_bytes = static_cast<uint32_t>(group_values * p.scale_bytes);
  p.group_zero_bytes = static_cast<uint32_t>(group_values * p.zero_bytes);
  // A multiple of 128: a copy of 512 bytes that straddles one line more costs 8% (8192 x 8192, M = 1, H200, 2026-11-21).
  p.stage_bytes = align(static_cast<uint32_t>(kernel.rows / layout::kAtomRows * layout::atom_bytes(4)) +
                            p.group_scale_bytes + p.group_zero_bytes + tokens * kernel.x_pitch,
                        128);
  p.ring_bytes = kStages * p.stage_bytes;
  p.m = tokens;
  p.partial_bytes = static_cast<uint32_t>(tokens * kernel.partial_pitch);
  // With one tile a CTA a warp's sums may take the place of its ring.
  const bool shared_ring = passes == 1;
  if (shared_ring) p.ring_bytes = std::max(p.ring_bytes, align(p.partial_bytes, 128));
  uint32_t at = kSharedBase + (kernel.pair_table ? kPairTableBytes : 0);
  p.ring = at;
  at += warps * p.ring_bytes;
  if (shared_ring) {
    p.partial_at = p.ring;
    p.partial_bytes = p.ring_bytes;
  } else {
    p.partial_at = at = align(at, 16);
    at += warps * p.partial_bytes;
  }
  p.resolved_at = at = align(at, 16);
  if (kernel.resolves) at += warps * group_values * 4 * (p.zero_bytes != 0 ? 2 : 1);
  p.nested_map_at = at;
  if (w.scale_type == ScaleType::kNested) at += kNestedMapSize * 4;
  p.barriers = at = align(at, 8);
  at += 8 * 2;
  p.exchange_at = at = align(at, 16);
  p.exchange_bytes = split.cluster > 1 ? split.row_warps * kernel.rows * tokens * 4 : 0;
  at += p.exchange_bytes * (passes > 1 ? 2 : 1);
  const uint32_t limit = static_cast<uint32_t>(device.shared_bytes) + (device.clusters ? kSharedBase : 0);
  if (at > limit) return false;
  plan->split = split;
  plan->clusters = p.clusters;
  plan->shared_bytes = static_cast<int>(device.clusters ? at - kSharedBase : at);
  return true;
}

const Compiled* choose_plan(const GemmProblem& problem, int tokens, const Candidates& candidates,
                            const DeviceProperties& device, Params* params, Plan* plan) {
  const KernelTraits& kernel = candidates.kernels[0].traits;
  const int units = static_cast<int>(layout::ceil_div(problem.weight.n, kernel.rows));
  const int blocks = static_cast<int>(layout::blocks_along_k(problem.weight.k));
  double best = 1e30;
  Split best_split{};
  for (int cluster = 1; cluster <= kMaxCluster; cluster *= 2) {
    for (int row_warps = 1; row_warps <= kMaxWarps; ++row_warps) {
      for (int k_warps = 1; k_warps * row_warps <= kMaxWarps; k_warps *= 2) {
        if (2 * k_warps * row_warps <= kMaxWarps && 2 * k_warps * cluster <= blocks) continue;  // more warps fit
        const Split split{cluster, row_warps, k_warps};
        Params p = *params;
        Plan candidate;
        if (!plan_split(problem, tokens, kernel, device, split, &p, &candidate)) continue;
        const int tiles = static_cast<int>(layout::ceil_div(units, row_warps));
        const int passes = static_cast<int>(layout::ceil_div(tiles, p.clusters));
        const double weight_blocks = double(passes) * row_warps * blocks / cluster;  // of a CTA
        const double x_blocks = double(passes) * row_warps * blocks / cluster * tokens / 16.0;
        const double cost = weight_blocks + x_blocks + 4 * passes + (cluster > 1 ? 8 + cluster : 0);
        if (cost < best) {
          best = cost;
          best_split = split;
        }
      }
    }
  }
  return best < 1e30 && plan_split(problem, tokens, kernel, device, best_split, params, plan) ? &candidates.kernels[0] : nullptr;
}

}  // namespace cutlass_ext::cuda::stream
