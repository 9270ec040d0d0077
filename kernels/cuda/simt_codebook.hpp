// Where a weight's codebook is when a kernel is launched.
#pragma once

#include "kernels/problem.hpp"

namespace cutlass_ext::cuda {

constexpr int kMaxLevels = 32;  // of a codebook: 2^5

// A format's own codebook is host memory and travels in the kernel's parameters; one that the weight brought is on the
// device.
struct Codebook {
  float values[kMaxLevels];
  const float* device;  // nullptr: use `values`
};

static inline Codebook codebook_of(const Weight& w) {
  Codebook codebook{{}, w.codebook};
  for (const Format& format : kFormats) {
    if (w.codebook == nullptr || w.codebook != format.codebook) continue;
    for (int i = 0; i < format.levels(); ++i) codebook.values[i] = format.codebook[i];
    codebook.device = nullptr;
  }
  return codebook;
}

}  // namespace cutlass_ext::cuda
