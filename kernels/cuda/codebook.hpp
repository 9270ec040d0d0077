// A codebook as a kernel gets it: by value if it is the format's own, which lies in host memory, else by pointer.
#pragma once

#include "kernels/problem.hpp"

namespace cutlass_ext::cuda {

constexpr int kMaxLevels = 32;  // of a codebook format: five bits

struct CodebookParameter {
  float values[kMaxLevels];
  const float* own;  // the weight's own, on the GPU, or nullptr

  static CodebookParameter of(const Weight& w) {
    CodebookParameter codebook{};
    codebook.own = w.codebook_on_device ? w.codebook : nullptr;
    for (int i = 0; w.is_codebook && !w.codebook_on_device && i < 1 << w.bits; ++i) codebook.values[i] = w.codebook[i];
    return codebook;
  }

  __device__ float value(int code) const { return own != nullptr ? own[code] : values[code]; }
};

}  // namespace cutlass_ext::cuda
