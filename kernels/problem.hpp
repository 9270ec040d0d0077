// What a kernel gets: a checked problem with the format resolved to properties.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/format.hpp"

namespace cutlass_ext {

enum class Device { kCpu, kCuda };

// A weight. Packed codes, scales and zeros lie as kernels/layout.hpp says; GEMMs get packed weights only.
struct Weight {
  bool packed;  // else canonical
  int64_t n;
  int64_t k;
  int64_t group_size;
  int bits;
  layout::CodeOrder order;
  ScaleType scale_type;
  ZeroType zero_type;
  bool flat_scales;  // scale of (n, k) = scales[(n * K + k) / group_size]
  bool is_codebook;
  int bias;                 // integers: value = packed code - bias
  const float* codebook;    // codebooks: 2^bits values; integers: nullptr
  bool codebook_on_device;  // of a CUDA problem: a user's own; the formats' tables are in host memory
  const uint8_t* codes;
  const void* scales;
  const void* zeros;
  const float* nested_map;
  const float* nested_absmax;
  const float* nested_offset;  // one value, or nullptr
  const float* tensor_scale;   // one value, or nullptr

  int64_t groups() const { return layout::ceil_div(k, group_size); }  // of a row
};

// y[M, N] = x[M, K] W^T (+ bias [N]); transposed: y[M, K] = x[M, N] W (+ bias [K]).
struct GemmProblem {
  Device device;
  Weight weight;
  bool transposed;
  DType dtype;  // of x, y and bias
  int64_t m;
  const void* x;
  int64_t ldx;
  void* y;
  int64_t ldy;
  const void* bias;  // nullptr: none
  void* workspace;
  void* stream;
  int threads;               // CPU threads, >= 1
  bool programmatic_launch;  // CUDA: may start before the stream's previous kernel has ended (PDL)
};

struct DequantizeProblem {
  Device device;
  Weight weight;
  DType dtype;  // of out
  void* out;    // [N, K]
  int64_t ld;
  void* stream;
  int threads;  // CPU threads, >= 1
};

}  // namespace cutlass_ext
