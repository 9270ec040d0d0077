// Launches the stream kernel: the choice among its compiled configurations, parameters, and the instance.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/stream/kernel.cuh"
#include "kernels/cuda/stream/plan.hpp"
#include "kernels/decode.hpp"
#include "kernels/instance.hpp"

namespace cutlass_ext::cuda::stream {

template <class C>
Compiled compiled() {
  return {reinterpret_cast<const void*>(&stream_kernel<C>),
          {C::kTokenTiles, C::kGroups, C::kRows, C::Codes::kTable, C::kScales == ScaleSource::kResolved,
           partial_pitch(C::kAtoms), kXPadding, C::kRing, C::kStageBytes, C::kStages, C::kWarps}};
}

constexpr int kMaxTokens = 32;  // of a launch

template <class Codes, int kTokenTiles, ScaleSource kScales>
void add_atoms(Candidates* to) {
  // Where lookups and decoding scales come together four atoms have no registers, and were no faster (nested nf4, M =
  // 1: 14.6 us with four, 14.2 with two at 8192 x 8192; H200, 2026-11-21).
  constexpr bool kDecoded = kScales == ScaleSource::kNested || kScales == ScaleSource::kResolved;
  if constexpr (!(Codes::kTable && kDecoded)) to->add(compiled<Config<Codes, 4, kTokenTiles, 1, kScales>>());
  to->add(compiled<Config<Codes, 2, kTokenTiles, 1, kScales>>());
  // One atom a warp, for small weights: more than 16 tokens are compute-bound with it.
  if constexpr (kTokenTiles <= 2) to->add(compiled<Config<Codes, 1, kTokenTiles, 1, kScales>>());
}

// The scale type that is x's own.
template <class Codes>
constexpr ScaleType own_scale() {
  return std::is_same_v<typename Codes::T, __half> ? ScaleType::kFp16 : ScaleType::kBf16;
}

template <class Codes, int kTokenTiles>
Candidates candidates_for(const Weight& w) {
  Candidates found;
  const int64_t group = w.group_size >= w.k ? layout::kBlockK : w.group_size;
  if (group == 16) {
    found.add(compiled<Config<Codes, 2, kTokenTiles, 4, ScaleSource::kResolved>>());
  } else if (group == 32) {
    found.add(compiled<Config<Codes, 2, kTokenTiles, 2, ScaleSource::kResolved>>());
  } else if (w.zero_type == ZeroType::kNone && w.scale_type == ScaleType::kFp32) {
    add_atoms<Codes, kTokenTiles, ScaleSource::kFp32>(&found);
  } else if (w.zero_type == ZeroType::kNone && w.scale_type == own_scale<Codes>()) {
    add_atoms<Codes, kTokenTiles, ScaleSource::k16Bit>(&found);
  } else if (w.zero_type == ZeroType::kNone && w.scale_type == ScaleType::kNested) {
    add_atoms<Codes, kTokenTiles, ScaleSource::kNested>(&found);
  } else if (w.scale_type == own_scale<Codes>()) {
    add_atoms<Codes, kTokenTiles, ScaleSource::k16BitZeros>(&found);
  } else {
    add_atoms<Codes, kTokenTiles, ScaleSource::kResolved>(&found);
  }
  return found;
}

template <class Codes>
Candidates candidates_for(const Weight& w, int tokens) {
  if (tokens <= 8) return candidates_for<Codes, 1>(w);
  if (tokens <= 16) return candidates_for<Codes, 2>(w);
  return candidates_for<Codes, 4>(w);
}

// What does not depend on the plan.
Params params_of(const GemmProblem& problem, int64_t first_token, int tokens);

// nullptr, or what CUDA reported.
const char* launch(const void* function, const GemmProblem& problem, const Params& params, const Plan& plan);

// Where integer accumulators start: codes.cuh.
template <class Codes>
void start_integers(const Weight& w, Params* p) {
  const float bias = static_cast<float>(w.bias);
  const float low = Codes::kMagic + bias, high = Codes::kMagic + Codes::kHighRows * bias;
  const bool zeros = w.zero_type != ZeroType::kNone;
  const auto pair = [](float v) {  // exact in both types
    const bool fp16 = std::is_same_v<typename Codes::T, __half>;
    return (fp16 ? float_to_fp16(v) : float_to_bf16(v)) * 0x10001u;
  };
  p->start_low = pair(zeros ? -1 : -low);
  p->start_high = pair(zeros ? -1 : -high);
  if (w.zero_type == ZeroType::kInteger) {
    p->zero_offset_low = low - kIntegerZero;
    p->zero_offset_high = high - Codes::kHighRows * kIntegerZero;
  } else {
    p->start_offset_low = low;
    p->start_offset_high = high;
  }
}

// The best factor of a format's own codebook: found once for all of them.
template <class Codes>
float factor_for(const float* codebook) {
  struct Factors {
    float of[kFormatCount];
    Factors() {
      const auto round = [](float v) {
        return std::is_same_v<typename Codes::T, __half> ? fp16_to_float(float_to_fp16(v))
                                                         : bf16_to_float(float_to_bf16(v));
      };
      for (int i = 0; i < kFormatCount; ++i) {
        of[i] = 1;
        if (kFormats[i].codebook == nullptr || kFormats[i].levels() != kCodebookSize) continue;
        for (int f = 1; f < kFactors; ++f) {
          if (rounding_error(kFormats[i].codebook, factor_at(f), round) <
              rounding_error(kFormats[i].codebook, of[i], round)) {
            of[i] = factor_at(f);
          }
        }
      }
    }
  };
  static const Factors factors;
  for (int i = 0; i < kFormatCount; ++i) {
    if (kFormats[i].codebook == codebook) return factors.of[i];
  }
  return 1;
}

template <class Codes>
const char* gemm(const GemmProblem& problem) {
  const int64_t most = problem.ldx <= UINT32_MAX ? kMaxTokens : 1;  // a kernel's distance of rows has 32 bits
  for (int64_t token = 0; token < problem.m; token += most) {
    const int tokens = static_cast<int>(problem.m - token < most ? problem.m - token : most);
    const Candidates candidates = candidates_for<Codes>(problem.weight, tokens);
    Params params = params_of(problem, token, tokens);
    if constexpr (Codes::kTable) {
      if (!problem.weight.codebook_on_device) params.codebook_factor = factor_for<Codes>(problem.weight.codebook);
    } else {
      start_integers<Codes>(problem.weight, &params);
    }
    Plan plan;
    const Compiled* kernel = choose_plan(problem, tokens, candidates, device_properties(), &params, &plan);
    if (kernel == nullptr) return "no split of the problem fits this device's shared memory";
    if (const char* error = launch(kernel->function, problem, params, plan)) return error;
  }
  return nullptr;
}

template <class Codes, DType kDType>
bool supports(const GemmProblem& problem) {
  const Weight& w = problem.weight;
  return problem.dtype == kDType && w.bits == 4 && w.is_codebook == Codes::kTable && !w.flat_scales &&
         layout::ceil_div(w.k, w.group_size) * w.n / kNestedBlock < INT32_MAX;
}

template <class Codes, DType kDType>
constexpr Instance make_instance(const char* name) {
  return {name,    Device::kCuda, Family::kStream, &device_available, &supports<Codes, kDType>,
          nullptr, &gemm<Codes>,  nullptr};
}

}  // namespace cutlass_ext::cuda::stream
