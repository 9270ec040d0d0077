// Launches the transposed kernel: the choice among its compiled configurations, parameters, and the instance.
#pragma once

#include <type_traits>

#include "kernels/cuda/transposed/kernel.cuh"
#include "kernels/cuda/transposed/plan.hpp"
#include "kernels/instance.hpp"

namespace cutlass_ext::cuda::transposed {

template <class C>
Compiled compiled() {
  using Codes = typename C::Codes;
  return {reinterpret_cast<const void*>(&transposed_kernel<C>),
          {C::kTokens, C::kWarps, Codes::kTable, Codes::kPairTable, Codes::kFused, Codes::kFine}};
}

// Codes: a policy of wgmma/codes.cuh.
template <template <class, Scaling, int> class Codes, class T, int kTokens>
void add_kernels(Candidates* list) {
  // With 64 tokens x leaves no room for the table of value pairs: that policy looks values up in registers above them.
  constexpr int kCodesTokens = kTokens == kMaxTokens ? kTokens + 1 : kTokens;
  static_assert(kMaxTokens >= wgmma::kPairTokens);
  if constexpr (Codes<T, Scaling::kFused, 0>::kCanFuse) {
    list->add(compiled<Config<Codes<T, Scaling::kFused, kCodesTokens>, kTokens>>());
  }
  list->add(compiled<Config<Codes<T, Scaling::kPerBlock, kCodesTokens>, kTokens>>());
  list->add(compiled<Config<Codes<T, Scaling::kFine, kCodesTokens>, kTokens>>());
}

template <template <class, Scaling, int> class Codes, class T>
const Candidates& candidates() {
  static const Candidates all = [] {
    Candidates list;
    add_kernels<Codes, T, 8>(&list);
    add_kernels<Codes, T, 16>(&list);
    add_kernels<Codes, T, 32>(&list);
    add_kernels<Codes, T, kMaxTokens>(&list);
    return list;
  }();
  return all;
}

// What does not depend on the plan.
Params params_of(const GemmProblem& problem, int64_t first_token, int tokens);

// The part of `supports` that no template argument decides.
bool fits(const GemmProblem& problem);

// nullptr, or what CUDA reported.
const char* launch(const void* function, const GemmProblem& problem, const Params& params, const Plan& plan);

template <template <class, Scaling, int> class Codes, class T>
const char* gemm(const GemmProblem& problem) {
  for (int64_t token = 0; token < problem.m; token += kMaxTokens) {
    const int tokens = static_cast<int>(problem.m - token < kMaxTokens ? problem.m - token : kMaxTokens);
    Params params = params_of(problem, token, tokens);
    Plan plan;
    const Compiled* kernel = choose_plan(problem, tokens, candidates<Codes, T>(), device_properties(), &params, &plan);
    if (kernel == nullptr) return "no split of the problem fits this device's shared memory";
    if (const char* error = launch(kernel->function, problem, params, plan)) return error;
  }
  return nullptr;
}

template <template <class, Scaling, int> class Codes, class T>
bool supports(const GemmProblem& problem) {
  constexpr DType kDType = std::is_same_v<T, __half> ? DType::kFp16 : DType::kBf16;
  return problem.dtype == kDType && problem.weight.is_codebook == Codes<T, Scaling::kPerBlock, 0>::kTable &&
         fits(problem);
}

template <template <class, Scaling, int> class Codes, class T>
constexpr Instance make_instance(const char* name) {
  return {name,   Device::kCuda, Family::kTransposed, &device_available, &supports<Codes, T>, nullptr, &gemm<Codes, T>,
          nullptr};
}

}  // namespace cutlass_ext::cuda::transposed
