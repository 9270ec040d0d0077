// The manifest of instances, and which of them runs a problem.
#pragma once

#include "kernels/instance.hpp"

namespace cutlass_ext {

int instance_count();
const Instance& instance_at(int index);

// Index of the instance for a problem on the CPU.
int select_gemm(const GemmProblem& problem);
int select_dequantize();

}  // namespace cutlass_ext
