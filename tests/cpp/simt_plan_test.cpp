// Shared memory of the simt kernel, without a GPU: every weight that a format allows fits into every device that we
// build for, with the largest tile of tokens that is run there, and nothing overlaps.
#include "kernels/cuda/simt_plan.hpp"

#include <cstdio>
#include <cstdlib>

using namespace cutlass_ext;
using namespace cutlass_ext::cuda;

namespace {

int checks = 0;

void expect(bool condition, const char* what, const Weight& w, int tokens, int device_bytes) {
  ++checks;
  if (condition) return;
  std::printf("simt_plan_test: %s: bits=%d codebook=%d group=%lld scale=%d zero=%d tokens=%d shared=%d\n", what, w.bits,
              w.is_codebook, static_cast<long long>(w.group_size), static_cast<int>(w.scale_type),
              static_cast<int>(w.zero_type), tokens, device_bytes);
  std::exit(1);
}

void check(const Weight& w, int tokens, int device_bytes) {
  const int groups =
      w.flat_scales || w.group_size >= layout::kBlockK ? 1 : layout::kBlockK / static_cast<int>(w.group_size);
  const SimtMemory at = simt_memory(w, groups, tokens, device_bytes);
  const int values = w.flat_scales ? 0 : groups * kSimtUnitRows;
  const bool few = at.stages == kSimtFewStages && groups > 1 && simt_may_have_few_stages(w.bits, tokens);
  expect(at.stages == simt_stages(w.bits) || few, "stages", w, tokens, device_bytes);
  expect(at.scales >= kSimtUnitAtoms * layout::atom_bytes(w.bits) &&
             at.zeros >= at.scales + values * size_of(w.scale_type) &&
             at.second >= at.zeros + values * zero_size(w.zero_type, w.scale_type) && at.stage_bytes >= at.second,
         "pieces of a stage overlap", w, tokens, device_bytes);
  expect(at.scales % 16 == 0 && at.zeros % 16 == 0 && at.second % 16 == 0 && at.stage_bytes % 16 == 0 &&
             at.warp_bytes % 16 == 0 && at.warps % 16 == 0 && at.x % 16 == 0,
         "16-byte pieces", w, tokens, device_bytes);
  expect(at.warp_bytes >= at.stages * at.stage_bytes && at.x == at.warps + kSimtWarps * at.warp_bytes, "warps", w,
         tokens, device_bytes);
  for (int64_t k : {64, 4096, 1 << 20}) {
    for (int64_t n : {1, 4096, 1 << 18}) {
      for (int64_t m : {1, tokens, 1000}) {
        const SimtPlan plan = plan_simt(m, n, k, tokens, device_bytes - at.x, 132, device_bytes > (200 << 10));
        const int x = plan.chunk_blocks * layout::kBlockK * tokens * static_cast<int>(sizeof(float));
        expect(at.x + std::max(x, simt_sum_bytes(tokens, plan.tile_rows())) <= device_bytes, "shared memory", w, tokens,
               device_bytes);
      }
    }
  }
}

}  // namespace

int main() {
  static const float some = 0;  // of pointers only whether there is one counts
  // sm_86, sm_89, sm_120; sm_80; sm_90
  for (const int device_bytes : {101376, 166912, 232448}) {
    for (const Format& format : kFormats) {
      for (int scale = 0; scale < 32; ++scale) {
        for (int zero = 0; zero < 32; ++zero) {
          if ((format.scale_types >> scale & 1) == 0 || (format.zero_types >> zero & 1) == 0) continue;
          for (const int64_t group : {0, 16, 32, 64, 4096}) {
            Weight w{};
            w.bits = format.bits;
            w.is_codebook = format.is_codebook();
            w.scale_type = static_cast<ScaleType>(scale);
            w.zero_type = static_cast<ZeroType>(zero);
            w.zeros = w.zero_type == ZeroType::kNone ? nullptr : &some;
            w.flat_scales = group == 0;
            w.group_size = group == 0 ? 64 : group;
            for (int tokens = 1; tokens <= simt_most_tokens(device_bytes); tokens *= 2) check(w, tokens, device_bytes);
          }
        }
      }
    }
  }
  std::printf("simt_plan_test: %d checks\n", checks);
  return 0;
}
