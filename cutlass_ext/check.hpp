// Every argument check of the C API, once. A check changes nothing; on success the caller has a problem that every
// kernel may run.
#pragma once

#include "cutlass_ext/cutlass_ext.h"
#include "kernels/instance.hpp"
#include "kernels/problem.hpp"

namespace cutlass_ext {

const char* name_of(cx_scale_type type);
const char* name_of(cx_zero_type type);

// Format, types, shape and group size; what cx_weight_bytes needs.
cx_status check_spec(const char* function, const cx_weight* weight, const Format** format);

// Also the layout, the buffers' sizes and the pointers.
cx_status check_weight(const char* function, const cx_weight* weight, cx_layout layout, Weight* out);

// Also whether this build and this machine have it.
cx_status check_device(const char* function, cx_device device, Device* out);
cx_status check_dtype(const char* function, cx_dtype dtype);
// CPU threads to use; 0 asks OpenMP.
cx_status resolve_threads(const char* function, int32_t threads, int* out);

// All of cx_gemm_args but the workspace and the instance.
cx_status check_gemm(const char* function, const cx_gemm_args* args, GemmProblem* out);

cx_weight_sizes weight_sizes(const cx_weight& weight, const Format& format);

}  // namespace cutlass_ext
