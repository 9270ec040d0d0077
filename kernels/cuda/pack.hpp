// Canonical <-> packed on the GPU, byte for byte what kernels/cpu/pack.hpp writes.
#pragma once

#include "kernels/problem.hpp"

namespace cutlass_ext::cuda {

// Converts codes, scales and zeros of `from` (canonical if `pack`, else packed) into the other layout. Queued on
// `stream`; returns nullptr, or what CUDA reports.
const char* convert_layout(const Weight& from, bool pack, void* codes, void* scales, void* zeros, void* stream);

}  // namespace cutlass_ext::cuda
