// The manifest of instances, and which of them runs a problem.
#pragma once

#include "kernels/instance.hpp"

namespace cutlass_ext {

int instance_count();
const Instance& instance_at(int index);

// Whether an instance that is available runs a GEMM problem of its device.
bool covers(const Instance& instance, const GemmProblem& problem);

// Index of the instance for a problem, or -1 if there is none. With `dense_fallback` it may be a dequantizing one: for
// callers that have a dense GEMM.
int select_gemm(const GemmProblem& problem, bool dense_fallback);
int select_dequantize(Device device);

}  // namespace cutlass_ext
