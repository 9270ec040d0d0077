// Plans of the transposed kernel, without a GPU: for many shapes and weights a plan exists on every device, its tiles
// and parts of N cover the problem once, and pieces of shared memory neither overlap nor exceed the device's.
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

#include "kernels/cuda/transposed/plan.hpp"

using namespace cutlass_ext;
using namespace cutlass_ext::cuda;
using namespace cutlass_ext::cuda::transposed;

namespace {

int checks = 0;

void expect(bool condition, const char* what, const GemmProblem& p, int tokens) {
  ++checks;
  if (condition) return;
  std::printf("transposed_plan_test: %s: N=%lld K=%lld tokens=%d group=%lld codebook=%d scale=%d zero=%d\n", what,
              static_cast<long long>(p.weight.n), static_cast<long long>(p.weight.k), tokens,
              static_cast<long long>(p.weight.group_size), p.weight.is_codebook, static_cast<int>(p.weight.scale_type),
              static_cast<int>(p.weight.zero_type));
  std::exit(1);
}

// As kernels/cuda/transposed/launch.cuh compiles them.
Candidates candidates_of(bool table) {
  static const char functions[2][16] = {};  // told apart by address
  Candidates list;
  for (const int tokens : {8, 16, 32, 64}) {
    const auto add = [&](bool fused, bool fine) {
      const int warps = tokens > 32 ? 8 : tokens > 16 && fine && !table ? 12 : 16;
      list.add({&functions[table][list.count], {tokens, warps, table, table && tokens < 64, fused, fine}});
    };
    if (!table) add(true, false);
    add(false, false);
    add(false, true);
  }
  return list;
}

void check_plan(const GemmProblem& problem, int tokens, const KernelTraits& kernel, const DeviceProperties& device,
                const Params& p, const Plan& plan) {
  const Weight& w = problem.weight;
  const auto check = [&](bool condition, const char* what) { expect(condition, what, problem, tokens); };
  const Split& split = plan.split;
  const int64_t columns = layout::blocks_along_k(w.k), slabs = layout::slabs(w.n);
  const int64_t tiles = plan.ctas / split.cluster;
  check(p.m == tokens && tokens <= kernel.tokens && (kernel.tokens == 8 || tokens > kernel.tokens / 2),
        "the smallest kernel that takes the tokens");
  check(split.columns == 1 << p.columns_log && split.columns <= kMaxColumns && p.k_blocks == columns, "columns");
  check(plan.ctas % split.cluster == 0 && tiles * split.columns >= columns && (tiles - 1) * split.columns < columns,
        "the tiles cover K");
  const int parts = split.cluster * split.rows;
  check(p.part_slabs >= 1 && p.part_rest < parts && int64_t{p.part_slabs} * parts + p.part_rest == slabs,
        "the parts cover N");
  check(split.columns * split.rows <= kernel.warps && p.cluster == split.cluster &&
            device.active_clusters(split.cluster) > 0,
        "warps and clusters");
  check(!kernel.fused || w.zero_type == ZeroType::kNone, "a fused kernel has no zero points");
  check(p.groups_in_chunk * p.group_steps == layout::kSteps && (p.groups_in_chunk == 1 || kernel.fine),
        "groups of a block");
  const int64_t blocks = w.group_size / layout::kBlockK;  // of a group
  check(w.group_size >= w.k ? p.group_shift == 31
        : blocks <= 1       ? p.group_shift == 0
                            : 1 << p.group_shift == blocks,
        "blocks of a group");
  check(p.group_scale_bytes % 16 == 0 && p.group_zero_bytes % 16 == 0 && p.slab_scale_bytes % 16 == 0 &&
            p.scales_at % 16 == 0 && p.zeros_at % 16 == 0 && p.resolved_at % 16 == 0 && p.x_at % 16 == 0 &&
            p.stage_bytes % 16 == 0 && p.ring_at % 16 == 0,
        "alignment of copies");
  const uint32_t kinds = !kernel.table && p.has_rest ? 4 : 2;
  check(p.scales_at >= uint32_t{layout::block_bytes(4)} && p.zeros_at >= p.scales_at + p.group_scale_bytes &&
            p.resolved_at >= p.zeros_at + p.group_zero_bytes && p.x_at >= p.resolved_at + kinds * p.resolved_bytes &&
            p.stage_bytes >= p.x_at + static_cast<uint32_t>(tokens * kXPitch),
        "pieces of a stage");
  check(kStages * p.stage_bytes >= static_cast<uint32_t>(tokens * kSumPitch), "sums take the place of a ring");
  const uint32_t table_end = kSharedBase + (kernel.pair_table ? kPairTableBytes : 0);
  check(p.nested_map_at >= table_end &&
            p.ring_at >= p.nested_map_at + (w.scale_type == ScaleType::kNested ? kNestedMapSize * 4 : 0),
        "pieces before the rings");
  const int64_t end = p.ring_at + int64_t{split.columns} * split.rows * kStages * p.stage_bytes;
  check(plan.shared_bytes <= device.shared_bytes && end <= plan.shared_bytes + (device.clusters ? kSharedBase : 0),
        "the device's memory");
}

}  // namespace

int main() {
  constexpr int64_t kSizes[] = {1, 63, 64, 65, 130, 1000, 4096, 14336, 128256};
  static const DeviceProperties devices[] = {
      {132, 232448, true, {132, 66, 39, 30, 22, 17, 15, 15}},  // H200
      {108, 166912, false, {108, 0, 0, 0, 0, 0, 0, 0}},        // A100
      {84, 101376, false, {84, 0, 0, 0, 0, 0, 0, 0}},          // sm_86
      {170, 101376, true, {170, 85, 56, 42, 34, 28, 24, 21}},  // sm_120
  };
  for (const bool codebook : {false, true}) {
    const Candidates candidates = candidates_of(codebook);
    for (const DeviceProperties& device : devices) {
      for (const int64_t n : kSizes) {
        for (const int64_t k : kSizes) {
          for (const int tokens : {1, 8, 9, 17, 33, 64}) {
            for (const int64_t group : {int64_t{16}, int64_t{32}, int64_t{64}, int64_t{128}, int64_t{1024}, k}) {
              for (const ScaleType scale : {ScaleType::kFp32, ScaleType::kBf16, ScaleType::kE4M4, ScaleType::kNested}) {
                for (const ZeroType zero : {ZeroType::kNone, ZeroType::kInteger, ZeroType::kFloat}) {
                  const bool bytes = size_of(scale) == 1;
                  if (bytes ? !codebook || zero != ZeroType::kNone : codebook && zero != ZeroType::kNone) continue;
                  GemmProblem problem{};
                  problem.device = Device::kCuda;
                  problem.transposed = true;
                  problem.dtype = DType::kBf16;
                  problem.m = tokens;
                  Weight& w = problem.weight;
                  w.n = n, w.k = k, w.group_size = group, w.bits = 4, w.is_codebook = codebook, w.scale_type = scale;
                  w.zero_type = zero;
                  for (int again = 0; again < 2; ++again) {  // chosen, then remembered
                    Params params{};
                    Plan plan;
                    const Compiled* kernel = choose_plan(problem, tokens, candidates, device, &params, &plan);
                    expect(kernel != nullptr, "a plan", problem, tokens);
                    check_plan(problem, tokens, kernel->traits, device, params, plan);
                  }
                }
              }
            }
          }
        }
      }
    }
  }
  std::printf("transposed_plan_test: %d checks\n", checks);
  return 0;
}
