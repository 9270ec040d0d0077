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
          {C::kTokens, C::kBlocks, C::kRowTiles, C::kWarpgroups, C::kOutputBytes, C::Codes::kTable,
           C::Codes::kPairTable, C::Codes::kFused, C::Codes::kFine}};
}

// A tile is a line here.
template <template <class, Scaling, int> class Codes, class T, Scaling kScaling>
void add_tiles(Candidates* list) {
  list->add(compiled<Config<Codes<T, kScaling, 32>, 32, 1, 4>>());
  list->add(compiled<Config<Codes<T, kScaling, 64>, 64, 1, 4>>());
  list->add(compiled<Config<Codes<T, kScaling, 128>, 128, 1, 3>>());
  list->add(compiled<Config<Codes<T, kScaling, 128>, 128, 2, 2>>());
  list->add(compiled<Config<Codes<T, kScaling, 256>, 256, 1, 2>>());
}

// Codes: a policy of codes.cuh.
template <template <class, Scaling, int> class Codes, class T>
const Candidates& candidates() {
  static const Candidates all = [] {
    Candidates list;
    if constexpr (Codes<T, Scaling::kFused, 0>::kCanFuse) add_tiles<Codes, T, Scaling::kFused>(&list);
    add_tiles<Codes, T, Scaling::kPerBlock>(&list);
    list.add(compiled<Config<Codes<T, Scaling::kFine, 64>, 64, 1, 4>>());
    list.add(compiled<Config<Codes<T, Scaling::kFine, 128>, 128, 1, 3>>());
    list.add(compiled<Config<Codes<T, Scaling::kFine, 256>, 256, 1, 2>>());
    return list;
  }();
  return all;
}

// What does not depend on the plan.
Params params_of(const GemmProblem& problem);

// The part of `supports` that no template argument decides.
bool fits(const GemmProblem& problem);

// Whether the current device runs the kernels' machine code. `function`: one of them.
bool runs_here(const void* function);

// nullptr, or what CUDA reported.
const char* launch(const void* function, const GemmProblem& problem, const Params& params, const Plan& plan);

template <template <class, Scaling, int> class Codes, class T>
const char* gemm(const GemmProblem& problem) {
  Params params = params_of(problem);
  Plan plan;
  const Compiled* kernel = choose_plan(problem, candidates<Codes, T>(), device_properties(), &params, &plan);
  if (kernel == nullptr) return "no tile of the problem fits this device's shared memory";
  return launch(kernel->function, problem, params, plan);
}

template <template <class, Scaling, int> class Codes, class T>
bool supports(const GemmProblem& problem) {
  constexpr DType kDType = std::is_same_v<T, __half> ? DType::kFp16 : DType::kBf16;
  return problem.dtype == kDType && problem.weight.is_codebook == Codes<T, Scaling::kPerBlock, 0>::kTable &&
         fits(problem);
}

template <template <class, Scaling, int> class Codes, class T>
bool available() {
  return runs_here(candidates<Codes, T>().kernels[0].function);
}

template <template <class, Scaling, int> class Codes, class T>
constexpr Instance make_instance(const char* name) {
  return {name,    Device::kCuda,   Family::kWgmma, &available<Codes, T>, &supports<Codes, T>,
          nullptr, &gemm<Codes, T>, nullptr};
}

}  // namespace cutlass_ext::cuda::wgmma
