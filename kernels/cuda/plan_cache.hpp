// Plans that were chosen before. To choose one takes 5 us, so the calling thread keeps its last ones of each family.
#pragma once

#include <cstdint>

#include "kernels/cuda/device.hpp"
#include "kernels/problem.hpp"

namespace cutlass_ext::cuda {

// What a choice depends on, and the choice. `Split`: what a family's plan leaves to choose.
template <class Split>
struct PlanChoice {
  const DeviceProperties* device = nullptr;
  const void* function;  // of the first candidate
  int64_t n, k, group_size, tokens;
  ScaleType scale_type;
  ZeroType zero_type;
  int kernel;  // among the candidates
  Split split;

  bool suits(const Weight& w, int64_t m, const void* first, const DeviceProperties& on) const {
    return device == &on && function == first && n == w.n && k == w.k && group_size == w.group_size && tokens == m &&
           scale_type == w.scale_type && zero_type == w.zero_type;
  }
};

// The kernel for `tokens` tokens: replay(kernel, split) makes the plan of a choice that is known and says whether that
// went well; otherwise search(&split) finds one. nullptr: none fits.
template <class Split, class Candidates, class Replay, class Search>
auto choose_once(const Weight& w, int64_t tokens, const Candidates& candidates, const DeviceProperties& device,
                 Replay replay, Search search) -> decltype(&candidates.kernels[0]) {
  constexpr int kChoicesLog2 = 8;
  thread_local PlanChoice<Split> choices[1 << kChoicesLog2];
  const uint64_t hash =
      (static_cast<uint64_t>(w.n) * 31 + static_cast<uint64_t>(w.k)) * 61 + static_cast<uint64_t>(tokens);
  PlanChoice<Split>& choice = choices[hash * 0x9E3779B97F4A7C15u >> (64 - kChoicesLog2)];
  const void* first = candidates.kernels[0].function;
  if (choice.suits(w, tokens, first, device)) {
    const auto* kernel = &candidates.kernels[choice.kernel];
    return replay(*kernel, choice.split) ? kernel : nullptr;
  }
  Split split;
  const auto* kernel = search(&split);
  if (kernel != nullptr) {
    choice = {&device,      first,        w.n,
              w.k,          w.group_size, tokens,
              w.scale_type, w.zero_type,  static_cast<int>(kernel - candidates.kernels),
              split};
  }
  return kernel;
}

}  // namespace cutlass_ext::cuda
