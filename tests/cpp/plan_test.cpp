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
KernelTraits traits(int atoms, int token_tiles, int groups, bool table, bool resolves) {
  const int rows = atoms * layout::kAtomRows;
  const bool shared_x = token_tiles > 2;
  const int warps = shared_x ? 8 : token_tiles == 2 && (resolves || (table && atoms == 4)) ? 12 : kMaxWarps;
  return {token_tiles, groups,           rows, table, resolves, (rows + 4) * 4, layout::kBlockK * 2 + 16,
          shared_x,    shared_x ? 3 : 2, warps};
}

struct Range {
  int64_t begin, end;
};

void check_plan(const GemmProblem& problem, const KernelTraits& kernel, const DeviceProperties& device, const Params& p,
                const Plan& plan) {
  const Weight& w = problem.weight;
  const int parts = p.cluster * p.k_warps, warps = p.row_warps * p.k_warps;
  const int tokens = static_cast<int>(problem.m);
  expect(warps >= 1 && warps <= kernel.warps, "warps", problem);
  expect(
      p.part_blocks >= 1 && p.part_blocks * parts + p.part_rest == layout::blocks_along_k(w.k) && p.part_rest < parts,
      "the parts cover K", problem);
  expect(int64_t{p.units} * kernel.rows >= w.n && int64_t{p.tiles} * p.row_warps >= p.units, "the tiles cover N",
         problem);
  expect(p.clusters >= 1 && p.clusters <= p.tiles && p.clusters <= device.active_clusters(p.cluster), "clusters",
         problem);
  for (int warp = 0; warp < warps; ++warp) {
    expect(warp * p.row_warps_inverse >> 8 == warp / p.row_warps, "division by row warps", problem);
  }
  expect(p.row_warps * std::min(kernel.rows, 32) % p.cluster == 0, "rows of a CTA of the cluster", problem);

  const bool one_pass = p.tiles <= p.clusters;
  const int values = kernel.groups * layout::kBlockRows;
  std::vector<Range> pieces;
  const auto add = [&](uint32_t at, int64_t bytes) {
    if (bytes > 0) pieces.push_back({at, at + bytes});
  };
  if (kernel.pair_table) add(kSharedBase, kPairTableBytes);
  add(p.ring, int64_t{warps} * p.ring_bytes);
  expect(p.ring_bytes >= kernel.stages * p.stage_bytes && p.stage_bytes % 128 == 0, "stages", problem);
  if (one_pass) {
    expect(p.partial_at == p.ring && p.ring_bytes >= static_cast<uint32_t>(tokens * kernel.partial_pitch),
           "sums fit in a ring", problem);
  } else {
    add(p.partial_at, int64_t{warps} * p.partial_bytes);
  }
  if (kernel.resolves) add(p.resolved_at, int64_t{warps} * values * 4 * (p.zero_bytes != 0 ? 2 : 1));
  if (w.scale_type == ScaleType::kNested) add(p.nested_map_at, kNestedMapSize * 4);
  add(p.barriers, 16);
  expect(p.barriers % 8 == 0 && p.exchange_at % 16 == 0, "alignment", problem);
  if (p.cluster > 1) add(p.exchange_at, int64_t{one_pass ? 1 : 2} * p.row_warps * kernel.rows * tokens * 4);
  if (kernel.shared_x) add(p.x_at, int64_t{p.k_warps} * kernel.stages * p.x_stage_bytes);
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
              const bool resolves = groups > 1 || scale == ScaleType::kE4M4 || scale == ScaleType::kNested ||
                                    w.zero_type != ZeroType::kNone;
              // Functions of the kernels, told apart by address.
              static const char functions[2][4][2][3][5] = {};
              Candidates candidates;
              for (const int atoms : {4, 2, 1}) {
                if ((groups > 1 && atoms != 2) || (tiles == 4 && atoms == 1)) continue;
                candidates.add({&functions[codebook][groups - 1][resolves][tiles / 2][atoms],
                                traits(atoms, tiles, groups, codebook, resolves)});
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
  static const DeviceProperties h200{132, 232448, true, {132, 66, 30, 15}};
  static const DeviceProperties a100{108, 166912, false, {108, 0, 0, 0}};
  static const DeviceProperties small{82, 101376, false, {82, 0, 0, 0}};  // sm_86 and sm_89
  for (const DeviceProperties* device : {&h200, &a100, &small}) check_device(*device);
  std::printf("plan_test: %d checks\n", checks);
  return 0;
}
