// cx_quantize: checks, and the weight as the quantizer sees it.
#pragma once

#include "cutlass_ext/cutlass_ext.h"
#include "kernels/format.hpp"

namespace cutlass_ext {

// Of a weight that check_spec has seen.
size_t quantize_workspace(const cx_weight& weight, const Format& format);

cx_status quantize(const char* function, const cx_quantize_args* args);

}  // namespace cutlass_ext
