#include <cuda_runtime.h>

#include <cstdio>
#include <mutex>

#include "kernels/cuda/device.hpp"

namespace cutlass_ext::cuda {
namespace {

constexpr int kMaxDevices = 64;

// Exists in every architecture of this build: a device that cannot load it can load no kernel of the library.
__global__ void probe() {}

struct Entry {
  std::once_flag once;
  DeviceProperties properties{};
  char error[256] = "";
};

void query(int device, Entry& entry) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&entry.properties.sms, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&entry.properties.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaFuncAttributes attributes;
  const cudaError_t loaded = cudaFuncGetAttributes(&attributes, probe);
  if (loaded != cudaSuccess) {
    cudaGetLastError();  // not to be found by somebody else's check
    std::snprintf(entry.error, sizeof entry.error, "expected a GPU that this build has kernels for, got sm_%d%d (%s)",
                  major, minor, cudaGetErrorString(loaded));
    return;
  }
  // What PTX was compiled for decides, not the device: sm_80 code on a newer GPU has no clusters.
  entry.properties.clusters = attributes.binaryVersion >= 90 && attributes.ptxVersion >= 90;
  entry.properties.clusters_at_once[0] = entry.properties.sms;
  if (!entry.properties.clusters) return;
  cudaFuncSetAttribute(probe, cudaFuncAttributeMaxDynamicSharedMemorySize, entry.properties.shared_bytes);
  for (int i = 1; i < kMaxCluster; ++i) {
    const unsigned size = i + 1;
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {size, 1, 1};
    config.gridDim = dim3(size);
    config.blockDim = dim3(512);
    config.dynamicSmemBytes = static_cast<size_t>(entry.properties.shared_bytes);
    config.attrs = &cluster;
    config.numAttrs = 1;
    if (cudaOccupancyMaxActiveClusters(&entry.properties.clusters_at_once[i], probe, &config) != cudaSuccess) {
      cudaGetLastError();
      entry.properties.clusters_at_once[i] = 0;
    }
  }
}

Entry* current() {
  static Entry entries[kMaxDevices];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) {
    cudaGetLastError();
    return nullptr;
  }
  Entry& entry = entries[device];
  std::call_once(entry.once, query, device, std::ref(entry));
  return &entry;
}

}  // namespace

const char* device_error() {
  const Entry* entry = current();
  if (entry == nullptr) return "expected a CUDA device, found none";
  return entry->error[0] != '\0' ? entry->error : nullptr;
}

const DeviceProperties& device_properties() {
  static const DeviceProperties none{};
  const Entry* entry = current();
  return entry == nullptr ? none : entry->properties;
}

}  // namespace cutlass_ext::cuda
