// The name under which a device has a table.
#pragma once

#include "kernels/problem.hpp"

namespace cutlass_ext {

struct NamedDevice {
  int index;         // tells the devices of the process apart: -1 the CPU, else CUDA's ordinal
  const char* name;  // the CPU's model, or the GPU's name as CUDA reports it; "" if unknown
};

// The CPU, or the current CUDA device. Cached.
NamedDevice name_device(Device device);

}  // namespace cutlass_ext
