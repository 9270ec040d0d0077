// Round-to-nearest quantization on the GPU: a floating-point matrix becomes a canonical weight, with the codes and
// scales of pyquant/quantize.py bit for bit (the offset of nested scales may differ in its last bits: another order of
// summation).
#pragma once

#include "kernels/problem.hpp"

namespace cutlass_ext::cuda {

// What went wrong, on the GPU; all 0 if nothing did.
struct QuantizeStatus {
  uint32_t non_finite;   // w has NaN or Inf
  uint32_t large_scale;  // bits of the largest scale that its type cannot hold
  uint32_t large_sum;    // the sum of the absmax to be nested is not finite in fp32
  uint32_t absmax;       // bits of the largest |w|, for formats with a tensor scale
};

struct QuantizeProblem {
  Weight weight;  // canonical; all buffers but codebook and nested_map are written. codebook is in host memory
  float steps;    // signed integers: absmax is this many steps
  bool ties_to_even;
  DType dtype;  // of w
  const void* w;
  int64_t ld;
  QuantizeStatus* status;
  void* workspace;  // of quantize_workspace bytes, aligned to 8
  void* stream;
};

size_t quantize_workspace(const Weight& weight);

// Queued on the stream; returns nullptr, or what CUDA reports.
const char* quantize(const QuantizeProblem& problem);

}  // namespace cutlass_ext::cuda
