// Codebook values reach the MMA rounded to the type of x. That rounding is one error for all weights of a code, and for
// some codebooks (bitsandbytes' fp4 in fp16) its sum is beyond what rounding each weight costs. So the whole codebook
// is first multiplied by the factor out of 1, 1 + 1/32, .. 1 + 31/32 that makes the errors smallest, and sums are
// divided by it: fp4's values become exact with 33/32, those of NF4 lose a third of their error.
#pragma once

#include "kernels/cuda/stream/params.hpp"
#include "kernels/decode.hpp"

namespace cutlass_ext::cuda::stream {

constexpr int kFactors = 32;
CX_HOST_DEVICE constexpr float factor_at(int index) { return 1 + static_cast<float>(index) / kFactors; }

// Sum over a codebook of the squared errors that rounding leaves with a factor. `round` rounds to the type of x.
template <class Round>
CX_HOST_DEVICE float rounding_error(const float* codebook, float factor, Round round) {
  float error = 0;
  for (int i = 0; i < kCodebookSize; ++i) {
    const float value = codebook[i] * factor;
    const float difference = (round(value) - value) / factor;
    error += difference * difference;
  }
  return error;
}

}  // namespace cutlass_ext::cuda::stream
