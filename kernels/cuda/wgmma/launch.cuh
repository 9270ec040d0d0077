// Launches the wgmma kernel: the choice among its compiled configurations, parameters, and the instance.
#pragma once

#include "kernels/cuda/wgmma/codes.cuh"
#include "kernels/cuda/wgmma/kernel.cuh"
#include "kernels/cuda/wgmma/plan.hpp"
#include "kernels/instance.hpp"

namespace cutlass_ext::cuda::wgmma {

template <class C>
Compiled compiled() {
  return {reinterpret_cast<const void*>(&wgmma_kernel<C>),
          {C::kTokens, C::kRowTiles, C::kWarpgroups, C::kOutputTokens, C::Codes::kTable, C::kFine}};
}

// A tile is a line here.
template <class Codes>
const Candidates& candidates() {
  static const Candidates all = [] {
    Candidates list;
    list.add(compiled<Config<Codes, 32, 1, 4, false>>());
    list.add(compiled<Config<Codes, 64, 1, 4, false>>());
    list.add(compiled<Config<Codes, 128, 1, 3, false>>());
    list.add(compiled<Config<Codes, 128, 2, 2, false>>());
    list.add(compiled<Config<Codes, 256, 1, 2, false>>());
    list.add(compiled<Config<Codes, 64, 1, 4, true>>());
    list.add(compiled<Config<Codes, 256, 1, 2, true>>());
    return list;
  }();
  return all;
}

// What does not depend on the plan.
Params params_of(const GemmProblem& problem);

// The factor that a format's own codebook gets before it is rounded to the type of x: stream/codebook_factor.hpp.
float factor_of_codebook(const Weight& weight, DType dtype);

// The part of `supports` that no template argument decides.
bool fits(const GemmProblem& problem);

// Whether the current device runs the kernels' machine code. `function`: one of them.
bool runs_here(const void* function);

// nullptr, or what CUDA reported.
const char* launch(const void* function, const GemmProblem& problem, const Params& params, const Plan& plan);

template <class Codes>
Params params_for(const GemmProblem& problem, DType dtype) {
  Params params = params_of(problem);
  if (Codes::kTable) params.codebook_factor = factor_of_codebook(problem.weight, dtype);
  return params;
}

template <class Codes, DType kDType>
const char* gemm(const GemmProblem& problem) {
  Params params = params_for<Codes>(problem, kDType);
  Plan plan;
  const Compiled* kernel = choose_plan(problem, candidates<Codes>(), device_properties(), &params, &plan);
  if (kernel == nullptr) return "no tile of the problem fits this device's shared memory";
  return launch(kernel->function, problem, params, plan);
}

template <class Codes, DType kDType>
bool supports(const GemmProblem& problem) {
  return problem.dtype == kDType && problem.weight.is_codebook == Codes::kTable && fits(problem);
}

template <class Codes>
bool available() {
  return runs_here(candidates<Codes>().kernels[0].function);
}

template <class Codes, DType kDType>
constexpr Instance make_instance(const char* name) {
  return {name, Device::kCuda, Family::kWgmma, &available<Codes>, &supports<Codes, kDType>, nullptr, &gemm<Codes, kDType>, nullptr};
}

}  // namespace cutlass_ext::cuda::wgmma
