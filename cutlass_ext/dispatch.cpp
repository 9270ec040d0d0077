#include "cutlass_ext/dispatch.hpp"

namespace cutlass_ext {

#include "manifest.gen.inc"

namespace {

// Up to this many tokens the stream family is faster on the CPU: the times cross at 21 to 23 tokens (4096 x 4096; nf4,
// int8 and kbit5; one thread of a Cascade Lake, AVX-512, 2026-11-21).
constexpr int64_t kStreamTokens = 20;

// The manifest lists the instruction sets best first, and the portable one is always available.
int first_available(Family family) {
  int index = 0;
  while (kManifest[index]->family != family || !kManifest[index]->available()) ++index;
  return index;
}

}  // namespace

int instance_count() { return sizeof(kManifest) / sizeof(kManifest[0]); }

const Instance& instance_at(int index) { return *kManifest[index]; }

int select_gemm(const GemmProblem& problem) {
  return first_available(problem.m <= kStreamTokens ? Family::kStream : Family::kTile);
}

int select_dequantize() { return first_available(Family::kDequant); }

}  // namespace cutlass_ext
