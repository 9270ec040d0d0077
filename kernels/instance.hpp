// One compiled kernel and what the dispatch, the tests and the profiler may ask of it.
#pragma once

#include <cstddef>

#include "kernels/problem.hpp"

namespace cutlass_ext {

// kTransposed runs transposed problems, the others the rest.
enum class Family { kStream, kWgmma, kTile, kSimt, kTransposed, kDequant };

struct Instance {
  const char* name;  // <device>_<family>_<isa or variant>, the key everywhere
  Device device;
  Family family;
  bool (*available)();  // whether this machine (CUDA: the current device) can run it
  // GEMM families; nullptr in kDequant. Kernels return nullptr, or what CUDA reported about the launch.
  bool (*supports)(const GemmProblem&);  // nullptr: every problem of the device and family
  size_t (*workspace_bytes)(const GemmProblem&);
  const char* (*gemm)(const GemmProblem&);
  // kDequant; nullptr in the others.
  const char* (*dequantize)(const DequantizeProblem&);
};

}  // namespace cutlass_ext
