// Plans of the stream kernel, without a GPU: for many shapes, weights and devices a plan exists, covers the problem
// once, and its pieces of shared memory neither overlap nor exceed the device's.
#include "kernels/cuda/stream/plan.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace cutlass_ext;
using namespace cutlass_ext::cuda;
using namespace cutlass_ext::cuda::stream;

namespace {

int checks = 0;

void expect(bool condition, const char* what, const GemmProblem& p) {
  ++checks;
  if (condition) return;
  std::printf("plan_test: %s: N=%lld K=%lld M=%lld group=%lld codebook=%d scale=%d zero=%d\n", what,
              static_cast<long long>(p.weight.n), static_cast<long long>(p.weight.k), static_cast<long long>(p.m),
              static_cast<long long>(p.weight.group_size), p.weight.is_codebook, static_cast<int>(p.weight.scale_type),
              static_cast<int>(p.weight.zero_type));
  std::exit(1);
}

// As kernels/cuda/stream/kernel.cuh compiles them.
KernelTraits traits(int atoms, int token_tiles, int groups, bool table, bool resolves, int scale_bytes) {
  const int rows = atoms * layout::kAtomRows;
  const bool nested = !resolves && scale_bytes == 1;
  const bool large = resolves || (table && (atoms == 4 || (atoms == 2 && nested)));
  const int warps = token_tiles > 2 ? 8 : token_tiles == 2 && large ? 12 : kMaxWarps;
  const int stage_bytes = (atoms * layout::atom_bytes(4) + groups * layout::kBlockRows * scale_bytes + 127) / 128 * 128;
  const int stages = token_tiles == 1 && atoms == 4 && !table ? 3 : 2;
  const uint32_t ring_at = kSharedBase + (table ? kPairTableBytes : 0) + (nested ? 8192 : 0);
  return {token_tiles, groups, rows, table, resolves, (rows + 4) * 4, 16, ring_at, stage_bytes, stages, warps};
}

struct Range {
  int64_t begin, end;
};

void check_plan(const GemmProblem& problem, const KernelTraits& kernel, const DeviceProperties& device, const Params& p,
                const Plan& plan) {
  const Weight& w = problem.weight;
  const auto [cluster, row_warps, k_warps] = plan.split;
  const int parts = cluster * k_warps, warps = row_warps * k_warps;
  const int tokens = static_cast<int>(problem.m);
  expect(warps >= 1 && warps <= kernel.warps, "warps", problem);
  expect(
      p.part_blocks >= 1 && p.part_blocks * parts + p.part_rest == layout::blocks_along_k(w.k) && p.part_rest < parts,
      "the parts cover K", problem);
  expect(int64_t{p.units} * kernel.rows >= w.n && int64_t{p.tiles} * row_warps >= p.units, "the tiles cover N",
         problem);
  expect(plan.clusters >= 1 && plan.clusters <= p.tiles && plan.clusters <= device.active_clusters(cluster), "clusters",
         problem);
  expect(std::min(kernel.rows, 32) % cluster == 0, "rows of a CTA of the cluster", problem);

  const bool one_pass = p.tiles <= plan.clusters;
  const int values = kernel.groups * layout::kBlockRows;
  std::vector<Range> pieces;
  const auto add = [&](uint32_t at, int64_t bytes) {
    if (bytes > 0) pieces.push_back({at, at + bytes});
  };
  if (kernel.pair_table) add(kSharedBase, kPairTableBytes);
  const uint32_t ring_bytes = static_cast<uint32_t>(kernel.stages * kernel.stage_bytes);
  add(kernel.ring_at, int64_t{warps} * ring_bytes);
  expect(kernel.stage_bytes >=
             kernel.rows * layout::kBlockK / 2 + static_cast<int>(p.group_scale_bytes + p.group_zero_bytes),
         "a block fits in a stage", problem);
  if (p.partial_at == kernel.ring_at) {
    expect(
        one_pass && p.partial_bytes == ring_bytes && ring_bytes >= static_cast<uint32_t>(tokens * kernel.partial_pitch),
        "sums fit in a ring", problem);
  } else {
    add(p.partial_at, int64_t{warps} * p.partial_bytes);
  }
  if (kernel.resolves) add(p.resolved_at, int64_t{warps} * values * 4 * (p.zero_bytes != 0 ? 2 : 1));
  if (kernel.resolves && w.scale_type == ScaleType::kNested) add(p.nested_map_at, kNestedMapSize * 4);
  add(p.barriers, 16);
  expect(p.barriers % 8 == 0 && p.exchange_at % 16 == 0, "alignment", problem);
  if (cluster > 1) add(p.exchange_at, int64_t{one_pass ? 1 : 2} * row_warps * kernel.rows * tokens * 4);
  if (p.x_resident) {
    const int most = k_warps * p.part_blocks + std::min(k_warps, p.part_rest);  // blocks of a CTA
    expect(p.x_pitch >= most * p.x_step, "x of a CTA's part", problem);
    add(p.x_at, int64_t{tokens} * p.x_pitch);
  } else {
    expect(one_pass || p.part_blocks >= kernel.stages, "x of the first stages", problem);
    add(p.x_at, int64_t{warps} * kernel.stages * tokens * p.x_pitch);
  }
  std::sort(pieces.begin(), pieces.end(), [](Range a, Range b) { return a.begin < b.begin; });
  for (size_t i = 0; i + 1 < pieces.size(); ++i) expect(pieces[i].end <= pieces[i + 1].begin, "overlap", problem);
  const int64_t start = device.clusters ? kSharedBase : 0;
  expect(pieces.front().begin >= start && pieces.back().end <= start + plan.shared_bytes, "dynamic memory", problem);
  expect(plan.shared_bytes <= device.shared_bytes, "the device's memory", problem);
}

void check_device(const DeviceProperties& device) {
  constexpr int64_t kSizes[] = {1, 16, 63, 64, 65, 130, 768, 1000, 2048, 4096, 14336, 28672, 128256};
  for (const int64_t n : kSizes) {
    for (const int64_t k : kSizes) {
      for (const int tokens : {1, 2, 8, 9, 16, 17, 32}) {
        for (const int64_t group : {int64_t{16}, int64_t{32}, int64_t{64}, int64_t{128}, k}) {
          for (const bool codebook : {false, true}) {
            for (const ScaleType scale : {ScaleType::kFp32, ScaleType::kBf16, ScaleType::kE4M4, ScaleType::kNested}) {
              GemmProblem problem{};
              problem.device = Device::kCuda;
              problem.m = tokens;
              Weight& w = problem.weight;
              w.n = n, w.k = k, w.group_size = group, w.bits = 4, w.is_codebook = codebook, w.scale_type = scale;
              w.zero_type = !codebook && scale == ScaleType::kFp32 ? ZeroType::kInteger : ZeroType::kNone;
              const int tiles = tokens <= 8 ? 1 : tokens <= 16 ? 2 : 4;
              const int groups = group >= k || group >= 64 ? 1 : static_cast<int>(64 / group);
              const bool zeros = w.zero_type != ZeroType::kNone;
              const bool nested = codebook && groups == 1 && scale == ScaleType::kNested;
              const bool resolves =
                  groups > 1 || scale == ScaleType::kE4M4 || zeros || (scale == ScaleType::kNested && !nested);
              const int scale_bytes = (resolves ? 4 : size_of(scale)) * (zeros ? 2 : 1);
              // Functions of the kernels, told apart by address.
              static const char functions[2][4][2][3][5] = {};
              Candidates candidates;
              for (const int atoms : {4, 2, 1}) {
                if ((groups > 1 && atoms != 2) || (tiles == 4 && atoms == 1)) continue;
                if (atoms == 4 && codebook && (resolves || (nested && tiles == 1))) continue;
                candidates.add({&functions[codebook][groups - 1][resolves][tiles / 2][atoms],
                                traits(atoms, tiles, groups, codebook, resolves, scale_bytes)});
              }
              for (int again = 0; again < 2; ++again) {  // chosen, then remembered
                Params params{};
                Plan plan;
                const Compiled* kernel = choose_plan(problem, tokens, candidates, device, &params, &plan);
                expect(kernel != nullptr, "a plan", problem);
                check_plan(problem, kernel->traits, device, params, plan);
              }
            }
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  static const DeviceProperties h200{132, 232448, true, {132, 66, 39, 30, 22, 17, 15, 15}};
  static const DeviceProperties a100{108, 166912, false, {108}};
  static const DeviceProperties small{82, 101376, false, {82, 0, 0, 0}};  // sm_86 and sm_89
  for (const DeviceProperties* device : {&h200, &a100, &small}) check_device(*device);
  std::printf("plan_test: %d checks\n", checks);
  return 0;
}
