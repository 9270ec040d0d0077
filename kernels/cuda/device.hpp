// The current CUDA device, as kernels and checks need to know it. No call here synchronizes.
#pragma once

namespace cutlass_ext::cuda {

struct DeviceProperties {
  int sms;
  int shared_bytes;  // of a block, at most
  bool clusters;     // sm_90 and up
};

// Why kernels cannot run on the current device, or nullptr. Cached per device.
const char* device_error();
inline bool device_available() { return device_error() == nullptr; }

// Of the current device; cached.
const DeviceProperties& device_properties();

}  // namespace cutlass_ext::cuda
