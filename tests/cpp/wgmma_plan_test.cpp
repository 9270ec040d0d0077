// Plans of the wgmma kernel, without a GPU: for many shapes and weights a plan exists, its tiles and parts of K cover
// the problem once, copies are within the limits of tensor maps, and pieces of shared memory neither overlap nor exceed
// the device's.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "kernels/cuda/wgmma/plan.hpp"

using namespace cutlass_ext;
using namespace cutlass_ext::cuda;
using namespace cutlass_ext::cuda::wgmma;

namespace {

int checks = 0;

void expect(bool condition, const char* what, const GemmProblem& p) {
  ++checks;
  if (condition) return;
  std::printf("wgmma_plan_test: %s: N=%lld K=%lld M=%lld group=%lld codebook=%d scale=%d zero=%d\n", what,
              static_cast<long long>(p.weight.n), static_cast<long long>(p.weight.k), static_cast<long long>(p.m),
              static_cast<long long>(p.weight.group_size), p.weight.is_codebook, static_cast<int>(p.weight.scale_type),
              static_cast<int>(p.weight.zero_type));
  std::exit(1);
}

// As kernels/cuda/wgmma/launch.cuh compiles them.
Candidates candidates_of(bool table) {
  struct Tile {
    int tokens, row_tiles, warpgroups;
  };
  constexpr Tile kTiles[] = {{32, 1, 4}, {64, 1, 4}, {128, 1, 3}, {128, 2, 2}, {256, 1, 2}};
  constexpr Tile kFineTiles[] = {{64, 1, 4}, {128, 1, 3}, {256, 1, 2}};
  static const char functions[2][16] = {};  // told apart by address
  Candidates list;
  const auto add = [&](const Tile& t, bool fused, bool fine) {
    list.add({&functions[table][list.count],
              {t.tokens, t.tokens <= 128 ? 2 : 1, t.row_tiles, t.warpgroups, std::min(t.tokens, 64) * 128, table,
               table && t.tokens <= 64, fused, fine}});
  };
  for (const Tile& t : kTiles) {
    if (!table) add(t, true, false);
    add(t, false, false);
  }
  for (const Tile& t : kFineTiles) add(t, false, true);
  return list;
}

struct Range {
  int64_t begin, end;
};

void check_plan(const GemmProblem& problem, const KernelTraits& kernel, const DeviceProperties& device, const Params& p,
                const Plan& plan) {
  const Weight& w = problem.weight;
  const int64_t chunks = layout::ceil_div(layout::blocks_along_k(w.k), kernel.blocks);
  expect(p.part_chunks >= 1 && p.part_rest < p.cluster && p.part_chunks * p.cluster + p.part_rest == chunks,
         "the parts cover K", problem);
  expect(int64_t{p.row_tiles} * p.slabs_per_cta >= layout::slabs(w.n) &&
             int64_t{p.row_tiles - 1} * p.slabs_per_cta < layout::slabs(w.n) &&
             int64_t{p.token_tiles} * p.tile_tokens >= problem.m &&
             int64_t{p.token_tiles - 1} * p.tile_tokens < problem.m,
         "the tiles cover N and M", problem);
  expect(p.clusters >= 1 && p.clusters <= int64_t{p.row_tiles} * p.token_tiles && p.cluster <= kMaxCluster &&
             p.clusters <= device.active_clusters(p.cluster),
         "clusters", problem);
  expect(plan.threads == (p.slabs_per_cta / kernel.row_tiles * p.k_warpgroups + 1) * kWarpgroupThreads &&
             plan.threads <= (kernel.warpgroups + 1) * kWarpgroupThreads,
         "threads", problem);
  expect(p.tile_tokens <= kernel.tokens && p.tile_tokens <= 256 && p.slabs_per_cta <= 256 &&
             p.group_scale_pieces >= 1 && p.group_scale_pieces <= 256 && p.group_zero_pieces <= 256,
         "boxes", problem);
  expect(p.group_scale_bytes % 16 == 0 && p.group_zero_bytes % 16 == 0 && p.scales_at % 128 == 0 &&
             (p.zero_bytes == 0 || p.zeros_at % 128 == 0),
         "alignment of copies", problem);
  expect(p.groups_in_chunk * p.group_steps == kernel.blocks * layout::kSteps, "groups of a chunk", problem);
  expect(!kernel.fused || w.zero_type == ZeroType::kNone, "a fused kernel has no zero points", problem);
  expect(p.groups_in_chunk <= kernel.blocks || kernel.fine, "groups below a block need a fine kernel", problem);
  expect(p.stages >= 2 && p.stages <= kMaxStages && p.stage_bytes % kSharedAlignment == 0 &&
             p.ring_at % kSharedAlignment == 0 && p.resolved_at + 2 * p.resolved_bytes <= p.stage_bytes,
         "stages", problem);
  std::vector<Range> pieces;
  const auto add = [&](uint32_t at, int64_t bytes) {
    if (bytes > 0) pieces.push_back({at, at + bytes});
  };
  if (kernel.pair_table) add(0, kPairTableBytes);
  expect(p.k_warpgroups <= p.part_chunks && p.k_warpgroups <= p.stages &&
             (p.k_warpgroups == 1 || int64_t{p.row_tiles} * p.token_tiles == p.clusters),
         "warpgroups along K", problem);
  const int64_t sum_bytes = int64_t{p.slabs_per_cta} * layout::kBlockRows * kernel.tokens * 4;
  const int64_t sums = p.cluster > 1 || p.k_warpgroups > 1 ? p.k_warpgroups * sum_bytes : 0;
  add(p.ring_at, std::max(int64_t{p.stages} * p.stage_bytes, sums));
  add(p.output_at, int64_t{p.slabs_per_cta / kernel.row_tiles} * p.k_warpgroups * kernel.output_bytes);
  add(p.codebook_at, 2 * kCodebookSize);
  if (w.scale_type == ScaleType::kNested) add(p.nested_map_at, kNestedMapSize * 4);
  add(p.barriers_at, 3 * kMaxStages * 8);
  expect(p.output_at % 128 == 0 && p.codebook_at % 16 == 0 && p.barriers_at % 8 == 0, "alignment", problem);
  std::sort(pieces.begin(), pieces.end(), [](Range a, Range b) { return a.begin < b.begin; });
  for (size_t i = 0; i + 1 < pieces.size(); ++i) expect(pieces[i].end <= pieces[i + 1].begin, "overlap", problem);
  expect(pieces.back().end <= plan.shared_bytes && plan.shared_bytes <= device.shared_bytes, "the device's memory",
         problem);
}

}  // namespace

int main() {
  static const DeviceProperties h200{132, 232448, true, {132, 66, 39, 30, 22, 17, 15, 15}};
  constexpr int64_t kSizes[] = {1, 63, 64, 65, 130, 1000, 4096, 14336, 128256};
  for (const bool codebook : {false, true}) {
    const Candidates candidates = candidates_of(codebook);
    for (const int64_t n : kSizes) {
      for (const int64_t k : kSizes) {
        for (const int64_t m : {1, 17, 33, 64, 100, 128, 300, 1000, 4096, 131072}) {
          for (const int64_t group : {int64_t{16}, int64_t{32}, int64_t{64}, int64_t{128}, int64_t{1024}, k}) {
            for (const ScaleType scale : {ScaleType::kFp32, ScaleType::kBf16, ScaleType::kE4M4, ScaleType::kNested}) {
              for (const ZeroType zero : {ZeroType::kNone, ZeroType::kInteger, ZeroType::kFloat}) {
                if (zero != ZeroType::kNone && (codebook || scale == ScaleType::kE4M4 || scale == ScaleType::kNested)) {
                  continue;
                }
                GemmProblem problem{};
                problem.device = Device::kCuda;
                problem.dtype = DType::kBf16;
                problem.m = m;
                Weight& w = problem.weight;
                w.n = n, w.k = k, w.group_size = group, w.bits = 4, w.is_codebook = codebook, w.scale_type = scale;
                w.zero_type = zero;
                for (int again = 0; again < 2; ++again) {  // chosen, then remembered
                  Params params{};
                  Plan plan;
                  const Compiled* kernel = choose_plan(problem, candidates, h200, &params, &plan);
                  expect(kernel != nullptr, "a plan", problem);
                  check_plan(problem, kernel->traits, h200, params, plan);
                }
              }
            }
          }
        }
      }
    }
  }
  std::printf("wgmma_plan_test: %d checks\n", checks);
  return 0;
}
