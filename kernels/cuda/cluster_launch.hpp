// Launches a kernel with what the runtime's <<<>>> has no place for: clusters and programmatic dependent launch.
#pragma once

#include <cuda_runtime.h>

#include <set>
#include <utility>

#include "kernels/cuda/device.hpp"

namespace cutlass_ext::cuda {

struct LaunchShape {
  dim3 blocks;
  dim3 threads;
  int shared_bytes;
  int cluster;               // blocks of a cluster, along x; 1: none
  bool programmatic_launch;  // the device must have it: sm_90 and up
  void* stream;
};

// nullptr, or what CUDA reported.
inline const char* error_text(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // not to be found by somebody else's check
  return cudaGetErrorString(error);
}

// Lets the kernel use all the shared memory that the current device has for a block. Asked of CUDA once per kernel and
// device, not in every call.
inline cudaError_t allow_shared_memory(const void* function) {
  thread_local std::set<std::pair<const void*, int>> allowed;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (allowed.count({function, device}) != 0) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, device_properties().shared_bytes);
  if (error == cudaSuccess) allowed.insert({function, device});
  return error;
}

// nullptr, or what CUDA reported. `params`: the kernel's one argument.
inline const char* launch(const void* function, const LaunchShape& shape, const void* params) {
  if (const cudaError_t error = allow_shared_memory(function)) return error_text(error);
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = shape.blocks;
  config.blockDim = shape.threads;
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(shape.stream);
  config.attrs = attributes;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  }
  if (shape.programmatic_launch) {
    cudaLaunchAttribute& programmatic = attributes[config.numAttrs++];
    programmatic.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    programmatic.val.programmaticStreamSerializationAllowed = 1;
  }
  void* arguments[] = {const_cast<void*>(params)};
  return error_text(cudaLaunchKernelExC(&config, function, arguments));
}

// The same for a kernel whose type is known.
template <class Params>
const char* launch(void (*kernel)(Params), const LaunchShape& shape, const Params& params) {
  return launch(reinterpret_cast<const void*>(kernel), shape, static_cast<const void*>(&params));
}

}  // namespace cutlass_ext::cuda
