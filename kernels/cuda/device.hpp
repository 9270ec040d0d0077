// The current CUDA device, as kernels and checks need to know it. No call here synchronizes.
#pragma once

namespace cutlass_ext::cuda {

constexpr int kMaxCluster = 8;  // the portable limit

struct DeviceProperties {
  int sms;
  int shared_bytes;  // of a block, at most
  bool clusters;     // sm_90 and up
  // Clusters of 1, 2, ... CTAs that run at once with one CTA an SM. Fewer than sms / size: a cluster lies within one
  // GPC (an H200 with 132 SMs: 132, 66, 39, 30, 22, 17, 15, 15).
  int clusters_at_once[kMaxCluster];

  int active_clusters(int size) const { return clusters_at_once[size - 1]; }
};

// Why kernels cannot run on the current device, or nullptr. Cached per device.
const char* device_error();
inline bool device_available() { return device_error() == nullptr; }

// Of the current device; cached.
const DeviceProperties& device_properties();

}  // namespace cutlass_ext::cuda
