// What every host function that launches a kernel needs.
#pragma once

#include <cuda_runtime.h>

namespace cutlass_ext::cuda {

// What CUDA says of the launches since the last call, or nullptr.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<size_t>(pointer) % bytes == 0; }

}  // namespace cutlass_ext::cuda
