// A weight format as kernels see it: properties, never a name. The rows come from pyquant/formats.py through the
// generator.
#pragma once

#include <cstdint>

#include "kernels/layout.hpp"

namespace cutlass_ext {

enum class Encoding : int32_t { kSigned, kUnsigned, kCodebook };
enum class ScaleType : int32_t { kFp32, kFp16, kBf16, kE4M4, kE4M3, kE8M0, kNested };
enum class ZeroType : int32_t { kNone, kInteger, kFloat };
enum class DType : int32_t { kFp32, kFp16, kBf16 };

constexpr int kNestedBlock = 256;    // absmax values that share one second-level scale
constexpr int kNestedMapSize = 256;  // entries of the first-level map

static constexpr int size_of(DType dtype) { return dtype == DType::kFp32 ? 4 : 2; }
static constexpr int size_of(ScaleType type) {
  return type == ScaleType::kFp32 ? 4 : type == ScaleType::kFp16 || type == ScaleType::kBf16 ? 2 : 1;
}
static constexpr int zero_size(ZeroType zero, ScaleType scale) {
  return zero == ZeroType::kNone ? 0 : zero == ZeroType::kInteger ? 1 : size_of(scale);
}

struct Format {
  int32_t id;
  const char* name;
  int bits;
  Encoding encoding;
  bool flat_blocks;        // groups run over the flattened weight
  bool tensor_scale;       // one fp32 per weight multiplies all scales
  uint32_t scale_types;    // bit i: ScaleType i is allowed
  uint32_t zero_types;     // bit i: ZeroType i is allowed
  const int* group_sizes;  // allowed group sizes, 0-terminated; empty: a power of two >= 16, or K
  const float* codebook;   // 2^bits values, or nullptr: integers, or every weight brings its own
  float half_step;         // signed integers: absmax is levels / 2 - half_step steps
  bool ties_to_even;       // a value halfway between two codebook entries takes the even code, else the lower entry

  constexpr int levels() const { return 1 << bits; }
  constexpr bool is_codebook() const { return encoding == Encoding::kCodebook; }
  // Packed integer codes are unsigned: value = packed code - bias.
  constexpr int bias() const { return encoding == Encoding::kSigned ? levels() / 2 : 0; }
  constexpr layout::CodeOrder order() const {
    return is_codebook() ? layout::CodeOrder::kPairs : layout::CodeOrder::kHalves;
  }
};

}  // namespace cutlass_ext

#include "format_table.gen.hpp"
