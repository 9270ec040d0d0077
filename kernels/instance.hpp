// One compiled kernel and what the dispatch, the tests and the profiler may ask of it.
#pragma once

#include <cstddef>

#include "kernels/problem.hpp"

namespace cutlass_ext {

enum class Device { kCpu, kCuda };
enum class Family { kStream, kTile, kDequant };

struct Instance {
  const char* name;  // <device>_<family>_<isa>, the key everywhere
  Device device;
  Family family;
  bool (*available)();  // whether this machine can run it
  // GEMM families; nullptr in kDequant.
  size_t (*workspace_bytes)(const GemmProblem&);
  void (*gemm)(const GemmProblem&);
  // kDequant; nullptr in the others.
  void (*dequantize)(const DequantizeProblem&);
};

}  // namespace cutlass_ext
