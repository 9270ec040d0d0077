#include "cutlass_ext/dispatch.hpp"

namespace cutlass_ext {

#include "manifest.gen.inc"

namespace {

constexpr int kCount = sizeof(kManifest) / sizeof(kManifest[0]);

// Up to this many tokens the stream family is faster on the CPU: the times cross at 21 to 23 tokens (4096 x 4096; nf4,
// int8 and kbit5; one thread of a Cascade Lake, AVX-512, 2026-11-21).
constexpr int64_t kCpuStreamTokens = 20;
// On a GPU, up to this many tokens a GEMM on the packed weight is taken to be faster than dequantizing it for the
// caller's dense GEMM.
constexpr int64_t kCudaStreamTokens = 32;
constexpr int64_t kCudaSimtTokens = 16;
// With wgmma: stream up to so many tokens, and the dense GEMM from so many.
constexpr int64_t kCudaStreamTokensBesideWgmma = 16;
constexpr int64_t kCudaWgmmaTokens = 2048;

// The first instance of a family that can run here; the manifest lists the best first. -1: none.
template <class Suits>
int first_available(Device device, Family family, Suits suits) {
  for (int i = 0; i < kCount; ++i) {
    const Instance& instance = *kManifest[i];
    if (instance.device == device && instance.family == family && suits(instance) && instance.available()) return i;
  }
  return -1;
}

int first_gemm(const GemmProblem& problem, Family family) {
  return first_available(problem.device, family, [&](const Instance& instance) {
    return instance.supports == nullptr || instance.supports(problem);
  });
}

int select_cuda(const GemmProblem& problem, bool dense_fallback) {
  const int stream = first_gemm(problem, Family::kStream);
  if (problem.m > kCudaStreamTokensBesideWgmma && (problem.m <= kCudaWgmmaTokens || !dense_fallback)) {
    const int wgmma = first_gemm(problem, Family::kWgmma);
    if (wgmma >= 0) return wgmma;
  }
  const int64_t limit = stream >= 0 ? kCudaStreamTokens : kCudaSimtTokens;
  if (dense_fallback && problem.m > limit) {
    const int dequant = select_dequantize(Device::kCuda);
    if (dequant >= 0) return dequant;
  }
  return stream >= 0 ? stream : first_gemm(problem, Family::kSimt);
}

}  // namespace

int instance_count() { return kCount; }

const Instance& instance_at(int index) { return *kManifest[index]; }

int select_gemm(const GemmProblem& problem, bool dense_fallback) {
  if (problem.device == Device::kCuda) return select_cuda(problem, dense_fallback);
  return first_gemm(problem, problem.m <= kCpuStreamTokens ? Family::kStream : Family::kTile);
}

int select_dequantize(Device device) {
  return first_available(device, Family::kDequant, [](const Instance&) { return true; });
}

}  // namespace cutlass_ext
