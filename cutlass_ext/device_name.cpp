#include "cutlass_ext/device_name.hpp"

#include <fstream>
#include <string>
#ifdef CUTLASS_EXT_CUDA
#include <cuda_runtime_api.h>

#include <mutex>
#endif

namespace cutlass_ext {
namespace {

// "model name" of Linux on x86; other systems have no such line.
std::string read_cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("model name", 0) != 0) continue;
    const size_t colon = line.find(": ");
    return colon == std::string::npos ? "" : line.substr(colon + 2);
  }
  return "";
}

NamedDevice name_cpu() {
  static const std::string name = read_cpu_name();
  return {-1, name.c_str(), 0};
}

#ifdef CUTLASS_EXT_CUDA
constexpr int kMaxDevices = 64;

NamedDevice name_gpu() {
  struct Name {
    std::once_flag once;
    cudaDeviceProp properties;
  };
  static Name names[kMaxDevices];
  int index = 0;
  if (cudaGetDevice(&index) != cudaSuccess || index >= kMaxDevices) {
    cudaGetLastError();
    return {index, "", 0};
  }
  Name& entry = names[index];
  std::call_once(entry.once, [&] {
    if (cudaGetDeviceProperties(&entry.properties, index) != cudaSuccess) {
      cudaGetLastError();
      entry.properties.name[0] = '\0';
      entry.properties.multiProcessorCount = 0;
    }
  });
  return {index, entry.properties.name, entry.properties.multiProcessorCount};
}
#endif

}  // namespace

NamedDevice name_device(Device device) {
#ifdef CUTLASS_EXT_CUDA
  if (device == Device::kCuda) return name_gpu();
#endif
  return device == Device::kCpu ? name_cpu() : NamedDevice{0, "", 0};
}

}  // namespace cutlass_ext
