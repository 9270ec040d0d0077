#include "cutlass_ext/dispatch.hpp"

#include "cutlass_ext/device_name.hpp"
#include "cutlass_ext/table.hpp"

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

// With so many tokens wgmma takes over from stream, where it covers the problem. Us of stream at M = 16, 17 and 32 / of
// wgmma at 17 and 32 (H200, cold weights in a CUDA graph, bf16, 2026-11-21):
//                 int4 g64                          nf4
//   1024 x 4096   4.8,  6.0,  6.6 /  6.6,  6.6      5.3,  6.3,  8.2 /  6.8,  6.8
//   4096 x 4096   6.5,  8.4,  9.4 /  8.7,  8.7      8.2,  8.6, 10.8 /  9.4,  9.4
//   6144 x 4096   8.8, 11.9, 13.0 / 10.5, 10.5     10.2, 11.7, 20.3 / 12.0, 12.0
//   8192 x 8192  14.5, 20.8, 22.4 / 17.1, 17.2     16.9, 19.3, 32.7 / 22.6, 20.6
//   28672 x 4096 25.0, 36.8, 41.1 / 25.5, 25.0     28.7, 32.4, 55.5 / 35.1, 32.1
int64_t cuda_wgmma_from(const Weight& w) { return w.n * w.k > int64_t{1} << 24 ? 17 : 25; }

// The same for simt. Us of simt / of dequant + cuBLAS at M = 1, 4, 8, 16 (H200, cold weights in a CUDA graph, bf16
// unless said, 2026-11-21):
//             4096 x 4096                                  1280 x 3420 or 1024 x 4096
//   kbit2     11.4, 13.8, 20.2, 31.6 / 22.5 .. 21.2        7.9, 8.5, 10.8, 15.2 / 11.7
//   kbit5     14.3, 17.3, 23.6, 36.8 / 25.1 .. 26.0        9.1, 10.0, 12.5, 16.6 / 12.5
//   int8      10.4, 15.0, 21.4, 30.0 / 25.1 .. 24.3        6.8, 8.0, 10.0, 14.4 / 15.9 .. 19.7
//   nf4 with flat scales (K = 4100 and 3420)
//             98, 99, 176, 311 / 36.5 .. 41.6              45, 45, 83, 141 / 15.3 .. 19.0
//   the same, fp32
//             101, 102, 184, 318 / 47 .. 74                45, 45, 84, 147 / 13.8 .. 39.5
//   nf4, fp32 8.4 (M = 1), 18.7 (8), 27.2 (16) / 43 .. 73
// Flat scales, which simt decodes for every weight, never pay.
int64_t cuda_simt_tokens(const GemmProblem& problem) {
  if (problem.weight.flat_scales) return 0;
  return problem.dtype == DType::kFp32 ? 16 : 8;
}

// Up to so many tokens wgmma is taken to be faster than dequantizing for the dense GEMM.
int64_t cuda_wgmma_tokens(const GemmProblem& problem) { return problem.weight.is_codebook ? 1024 : 2048; }

// Transposed: up to so many tokens the fused kernel is faster than dequantizing for the dense GEMM. Us of the two at
// M = 32, 64, 96 and 128 (H200, cold weights in a CUDA graph, bf16, 2026-11-21; profiles/h200/transposed.csv):
//                 int4 g128                                          nf4
//   1024 x 4096    7.0/ 8.8,  9.7/  9.1, 16.6/  9.2,  19.6/  9.7      7.7/ 8.8, 11.2/  9.1,  18.7/  9.2,  22.1/  9.7
//   4096 x 4096   11.2/22.0, 15.7/ 20.5, 26.6/ 26.0,  31.1/ 24.7     13.9/21.9, 19.2/ 20.7,  32.9/ 25.9,  38.3/ 24.6
//   6144 x 4096   13.4/33.4, 19.6/ 33.8, 32.3/ 36.4,  39.1/ 36.1     16.7/33.4, 24.5/ 34.1,  41.2/ 36.5,  49.4/ 36.7
//   4096 x 14336  23.8/74.2, 40.1/ 74.6, 62.6/ 75.1,  79.6/ 75.5     33.0/74.8, 50.4/ 75.1,  83.2/ 76.0, 100.1/ 76.3
//   8192 x 8192   23.2/83.5, 39.3/ 83.7, 62.3/ 84.6,  78.5/ 84.9     33.4/84.4, 49.9/ 84.8,  82.6/ 85.5, 100.6/ 85.8
//   28672 x 4096  38.9/ 141, 65.3/  142,  102/  145,   131/  147     55.1/ 142, 81.6/  144,   137/  146,   164/  148
int64_t cuda_transposed_tokens(const Weight& w) {
  const int64_t values = w.n * w.k;
  if (values < int64_t{1} << 23) return 32;
  const bool large = values >= int64_t{1} << 26;
  if (w.is_codebook) return large ? 96 : 64;
  return large ? 128 : values > int64_t{1} << 24 ? 96 : 64;
}

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
  return first_available(problem.device, family, [&](const Instance& instance) { return covers(instance, problem); });
}

// What the device's table or a cost model says, or -1 if there is none or it names what does not run this problem here.
int select_by_table(const GemmProblem& problem, bool dense_fallback) {
  const Weight& w = problem.weight;
  const Encoding kind = w.is_codebook ? Encoding::kCodebook : w.bias != 0 ? Encoding::kSigned : Encoding::kUnsigned;
  const TableEncoding encoding{kind, w.bits, w.scale_type == ScaleType::kNested, w.flat_scales};
  const NamedDevice device = name_device(problem.device);
  const TableEntry* entry = find_entry(device, {encoding.id(), problem.dtype, w.group_size, w.n, w.k, problem.m});
  if (entry == nullptr) return -1;
  const TableBucket& bucket = entry->at(problem.m);
  const int index = dense_fallback ? bucket.instance : bucket.gemm;
  if (index < 0 || index >= kCount) return -1;
  const Instance& instance = *kManifest[index];
  if (instance.device != problem.device || !instance.available()) return -1;
  if (instance.gemm == nullptr) return dense_fallback ? index : -1;
  return covers(instance, problem) ? index : -1;
}

int select_cuda(const GemmProblem& problem, bool dense_fallback) {
  const int stream = first_gemm(problem, Family::kStream);
  if (problem.m >= cuda_wgmma_from(problem.weight) && (problem.m <= cuda_wgmma_tokens(problem) || !dense_fallback)) {
    const int wgmma = first_gemm(problem, Family::kWgmma);
    if (wgmma >= 0) return wgmma;
  }
  const int64_t limit = stream >= 0 ? kCudaStreamTokens : cuda_simt_tokens(problem);
  if (dense_fallback && problem.m > limit) {
    const int dequant = select_dequantize(Device::kCuda);
    if (dequant >= 0) return dequant;
  }
  return stream >= 0 ? stream : first_gemm(problem, Family::kSimt);
}

int select_transposed(const GemmProblem& problem, bool dense_fallback) {
  if (problem.m <= cuda_transposed_tokens(problem.weight) || !dense_fallback) {
    const int fused = first_gemm(problem, Family::kTransposed);
    if (fused >= 0) return fused;
  }
  return dense_fallback ? select_dequantize(problem.device) : -1;
}

}  // namespace

bool covers(const Instance& instance, const GemmProblem& problem) {
  return (instance.family == Family::kTransposed) == problem.transposed &&
         (instance.supports == nullptr || instance.supports(problem));
}

int instance_count() { return kCount; }

const Instance& instance_at(int index) { return *kManifest[index]; }

int select_gemm(const GemmProblem& problem, bool dense_fallback) {
  if (problem.transposed) return select_transposed(problem, dense_fallback);  // tables are about the others
  if (const int chosen = select_by_table(problem, dense_fallback); chosen >= 0) return chosen;
  if (problem.device == Device::kCuda) return select_cuda(problem, dense_fallback);
  return first_gemm(problem, problem.m <= kCpuStreamTokens ? Family::kStream : Family::kTile);
}

int select_dequantize(Device device) {
  return first_available(device, Family::kDequant, [](const Instance&) { return true; });
}

}  // namespace cutlass_ext
