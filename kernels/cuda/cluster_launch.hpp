// Launches a kernel with what the runtime's <<<>>> has no place for: clusters and programmatic dependent launch.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "kernels/cuda/device.hpp"

namespace cutlass_ext::cuda {

struct LaunchShape {
  unsigned blocks;
  unsigned threads;
  int shared_bytes;
  int cluster;               // blocks of a cluster; 1: none
  bool programmatic_launch;  // the device must have it: sm_90 and up
  void* stream;
};

// nullptr, or what CUDA reported.
static inline const char* error_text(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // not to be found by somebody else's check
  return cudaGetErrorString(error);
}

// Lets the kernel use all the shared memory that the current device has for a block. Asked for once per device, not in
// every call.
template <auto kKernel>
cudaError_t allow_shared_memory() {
  static std::atomic<uint64_t> done{0};  // bit i: device i
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((done.load(std::memory_order_acquire) & bit) != 0) return cudaSuccess;
  error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device_properties().shared_bytes);
  if (error == cudaSuccess) done.fetch_or(bit, std::memory_order_release);
  return error;
}

template <auto kKernel, class Params>
const char* launch(const LaunchShape& shape, const Params& params) {
  if (const cudaError_t error = allow_shared_memory<kKernel>(); error != cudaSuccess) return error_text(error);
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(shape.stream);
  config.attrs = attributes;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    cluster.val.clusterDim.y = 1;
    cluster.val.clusterDim.z = 1;
  }
  if (shape.programmatic_launch) {
    cudaLaunchAttribute& programmatic = attributes[config.numAttrs++];
    programmatic.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    programmatic.val.programmaticStreamSerializationAllowed = 1;
  }
  return error_text(cudaLaunchKernelEx(&config, kKernel, params));
}

}  // namespace cutlass_ext::cuda
