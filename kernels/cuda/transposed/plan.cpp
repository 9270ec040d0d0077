#include "kernels/cuda/transposed/plan.hpp"

#include <algorithm>

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

// What a launch takes beyond a constant, in ns.
double cost_of(const GemmProblem& problem, const KernelTraits& kernel, const DeviceProperties& device, const Params& p,
               const Split& split) {
  constexpr double kMemoryRate = 34;  // bytes per ns and SM, all SMs reading weights
  constexpr double kCtaRate = 42;     // the same of a CTA on its own
  constexpr double kXRate = 42;       // x, which comes from L2
  constexpr double kIssueRate = 7;    // instructions per ns of an SM
  constexpr double kWarps = 9;        // that it takes to issue at this rate
  constexpr double kPass = 2500, kCluster = 700;
  const double columns = static_cast<double>(layout::blocks_along_k(problem.weight.k));
  const double slabs = static_cast<double>(layout::slabs(problem.weight.n));
  const double passes =
      static_cast<double>(layout::ceil_div(static_cast<int64_t>(columns), device.active_clusters(split.cluster)));
  // All warps of a CTA take as long as the one with the most.
  const double blocks = double(p.part_slabs + (p.part_rest > 0 ? 1 : 0)) * split.warps;
  const double bytes = layout::block_bytes(4) + p.group_scale_bytes + p.group_zero_bytes;
  const double instructions = (kernel.table ? 560 : 400) + 16.0 * kernel.tokens / 8;
  const double block = std::max(bytes / kCtaRate, instructions / (kIssueRate * std::min(1.0, split.warps / kWarps))) +
                       128.0 * p.m / kXRate;
  const double memory = columns * slabs * bytes / (kMemoryRate * device.sms);
  return std::max(memory, passes * blocks * block) + kPass * passes + (split.cluster > 1 ? kCluster : 0);
}

}  // namespace

bool plan_split(const GemmProblem& problem, int tokens, const KernelTraits& kernel, const DeviceProperties& device,
                const Split& split, Params* params, Plan* plan) {
  const Weight& w = problem.weight;
  Params& p = *params;
  const int64_t slabs = layout::slabs(w.n), columns = layout::blocks_along_k(w.k);
  const int parts = split.cluster * split.warps;
  if (tokens > kernel.tokens || split.warps > kernel.warps || parts > slabs) return false;
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
  p.stage_bytes = align(p.x_at + static_cast<uint32_t>(kernel.tokens) * kXPitch, 128);
  p.nested_map_at = kSharedBase + (kernel.pair_table ? kPairTableBytes : 0);
  p.ring_at = p.nested_map_at + (w.scale_type == ScaleType::kNested ? kNestedMapSize * 4 : 0);
  const int64_t end = p.ring_at + int64_t{split.warps} * kStages * p.stage_bytes;
  // Sums take the place of a warp's ring.
  static_assert(kStages * kXPitch >= kSumPitch);
  plan->shared_bytes = static_cast<int>(device.clusters ? end - kSharedBase : end);
  plan->split = split;
  plan->ctas = columns * split.cluster;
  return plan->shared_bytes <= device.shared_bytes && plan->ctas <= INT32_MAX;
}

namespace {

const Compiled* search(const GemmProblem& problem, int tokens, const Candidates& candidates,
                       const DeviceProperties& device, Params* params, Plan* plan) {
  constexpr int kWarps[] = {16, 12, 8, 6, 4, 3, 2, 1};
  const Compiled* best = nullptr;
  double best_cost = 0;
  const Params start = *params;
  // In the order of their tokens, those with the fewest instructions first.
  for (int i = 0; i < candidates.count && best == nullptr; ++i) {
    const Compiled& kernel = candidates.kernels[i];
    for (int cluster = 1; cluster <= kMaxCluster; cluster *= 2) {
      for (const int warps : kWarps) {
        Params p = start;
        Plan candidate;
        const Split split{cluster, warps};
        if (!plan_split(problem, tokens, kernel.traits, device, split, &p, &candidate)) continue;
        const double cost = cost_of(problem, kernel.traits, device, p, split);
        if (best != nullptr && cost >= best_cost) continue;
        best = &kernel;
        best_cost = cost;
        *params = p;
        *plan = candidate;
      }
    }
  }
  return best;
}

// What a choice depends on, and the choice; the calling thread keeps its last ones.
struct Choice {
  const DeviceProperties* device = nullptr;
  const void* function;  // of the first candidate
  int64_t n, k, group_size;
  int tokens;
  ScaleType scale_type;
  ZeroType zero_type;
  int kernel;
  Split split;

  bool suits(const GemmProblem& problem, int m, const Candidates& candidates, const DeviceProperties& on) const {
    const Weight& w = problem.weight;
    return device == &on && function == candidates.kernels[0].function && n == w.n && k == w.k &&
           group_size == w.group_size && tokens == m && scale_type == w.scale_type && zero_type == w.zero_type;
  }
};

constexpr int kChoices = 64;

Choice& choice_for(const Weight& w, int tokens) {
  thread_local Choice choices[kChoices];
  const uint64_t hash =
      (static_cast<uint64_t>(w.n) * 31 + static_cast<uint64_t>(w.k)) * 61 + static_cast<uint64_t>(tokens);
  return choices[hash * 0x9E3779B97F4A7C15u >> 58];
}

}  // namespace

const Compiled* choose_plan(const GemmProblem& problem, int tokens, const Candidates& candidates,
                            const DeviceProperties& device, Params* params, Plan* plan) {
  const Weight& w = problem.weight;
  Choice& choice = choice_for(w, tokens);
  if (choice.suits(problem, tokens, candidates, device)) {
    const Compiled* kernel = &candidates.kernels[choice.kernel];
    return plan_split(problem, tokens, kernel->traits, device, choice.split, params, plan) ? kernel : nullptr;
  }
  const Compiled* kernel = search(problem, tokens, candidates, device, params, plan);
  if (kernel != nullptr) {
    choice = {&device,
              candidates.kernels[0].function,
              w.n,
              w.k,
              w.group_size,
              tokens,
              w.scale_type,
              w.zero_type,
              static_cast<int>(kernel - candidates.kernels),
              plan->split};
  }
  return kernel;
}

}  // namespace cutlass_ext::cuda::transposed
