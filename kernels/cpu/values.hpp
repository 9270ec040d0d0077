// Runs of x, y, bias and dequantized weights: fp32 vectors from and to a DType, with tails.
#pragma once

#include <cstdint>

#include "kernels/cpu/codes.hpp"
#include "kernels/decode.hpp"

namespace cutlass_ext::cpu {

template <class Isa>
CX_INLINE typename Isa::F load_values(const void* base, int64_t index, DType dtype) {
  switch (dtype) {
    case DType::kFp32:
      return Isa::load(static_cast<const float*>(base) + index);
    case DType::kFp16:
      return Isa::load_fp16(static_cast<const uint16_t*>(base) + index);
    default:
      return Isa::load_bf16(static_cast<const uint16_t*>(base) + index);
  }
}

// The first `count` values; zeros behind them.
template <class Isa>
CX_INLINE typename Isa::F load_values(const void* base, int64_t index, DType dtype, int64_t count) {
  if (count >= kVector) return load_values<Isa>(base, index, dtype);
  alignas(64) float values[kVector] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = load_float(base, index + i, dtype);
  return Isa::load(values);
}

template <class Isa>
CX_INLINE void store_values(void* base, int64_t index, DType dtype, typename Isa::F a) {
  switch (dtype) {
    case DType::kFp32:
      return Isa::store(static_cast<float*>(base) + index, a);
    case DType::kFp16:
      return Isa::store_fp16(static_cast<uint16_t*>(base) + index, a);
    default:
      return Isa::store_bf16(static_cast<uint16_t*>(base) + index, a);
  }
}

// The first `count` values only.
template <class Isa>
CX_INLINE void store_values(void* base, int64_t index, DType dtype, typename Isa::F a, int64_t count) {
  if (count >= kVector) return store_values<Isa>(base, index, dtype, a);
  alignas(64) float values[kVector];
  Isa::store(values, a);
  for (int64_t i = 0; i < count; ++i) store_float(base, index + i, dtype, values[i]);
}

// y[token, n .. n + 15] = a + bias, without what lies beyond N.
template <class Isa>
CX_INLINE void store_output(const GemmProblem& p, int64_t token, int64_t n, typename Isa::F a) {
  const int64_t count = p.weight.n - n;
  if (count <= 0) return;
  if (p.bias != nullptr) a = Isa::add(a, load_values<Isa>(p.bias, n, p.dtype, count));
  store_values<Isa>(p.y, token * p.ldy + n, p.dtype, a, count);
}

}  // namespace cutlass_ext::cpu
