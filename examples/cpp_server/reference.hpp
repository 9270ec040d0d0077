// What a layer means, computed in double from the canonical weight and the properties of its format: the oracle of the
// client, written without the library's packing and kernels.
#pragma once

#include <cstdint>
#include <vector>

#include "cutlass_ext/cutlass_ext.h"

// The weight, row-major [N, K].
std::vector<double> dequantize_reference(const cx_weight& canonical);

// x[M, K] @ weight^T + bias, with `bias` empty or [N].
std::vector<double> linear_reference(const std::vector<float>& x, int64_t m, const std::vector<double>& weight,
                                     int64_t n, int64_t k, const std::vector<float>& bias);
