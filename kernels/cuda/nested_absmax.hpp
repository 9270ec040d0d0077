// Quantizes the absmax of a weight: less their mean, 256 share a second-level absmax, to the entries of the nested map.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/quantize.hpp"

namespace cutlass_ext::cuda {

// Bytes for partial sums and `count` absmax, aligned to 8.
size_t nested_workspace(int64_t count);

// Where in the workspace the absmax are expected.
float* absmax_to_nest(void* workspace);

// Writes the scales, nested_absmax and nested_offset of w. Queued on the stream; launch errors are the caller's to ask
// for.
void nest_absmax(void* workspace, int64_t count, const Weight& w, QuantizeStatus* status, cudaStream_t stream);

}  // namespace cutlass_ext::cuda
