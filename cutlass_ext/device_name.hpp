// The name under which a device has a table, and what its cost model needs to know of it.
#pragma once

#include "kernels/problem.hpp"

namespace cutlass_ext {

struct NamedDevice {
  int index;         // tells the devices of the process apart: -1 the CPU, else CUDA's ordinal
  const char* name;  // the CPU's model, or the GPU's name as CUDA reports it; "" if unknown
  int processors;    // SMs; 0: a CPU, or unknown
};

// The CPU, or the current CUDA device. Cached.
NamedDevice name_device(Device device);

}  // namespace cutlass_ext
