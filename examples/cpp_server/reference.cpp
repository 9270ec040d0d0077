#include "reference.hpp"

#include "cutlass_ext/cutlass_ext.hpp"
#include "number_formats.hpp"

namespace {

constexpr int64_t kNestedBlock = 256;  // scales that share one second-level scale

// Bits `at` .. `at + bits` of a row, lowest bits first. A code crosses at most one byte boundary.
uint32_t read_code(const uint8_t* row, int64_t at, int bits) {
  const int shift = static_cast<int>(at % 8);
  uint32_t word = row[at / 8];
  if (shift + bits > 8) word |= uint32_t{row[at / 8 + 1]} << 8;
  return word >> shift & ((1u << bits) - 1);
}

double decode(uint32_t code, const cx_format_info& format, const float* codebook) {
  if (format.is_codebook) return codebook[code];
  const int value = static_cast<int>(code);
  const int levels = 1 << format.bits;
  return format.is_signed && value >= levels / 2 ? value - levels : value;
}

// Element `index` of an array of the scale's type, before nesting.
double read_scalar(const void* values, cx_scale_type type, int64_t index) {
  switch (type) {
    case CX_SCALE_FP32:
      return static_cast<const float*>(values)[index];
    case CX_SCALE_FP16:
      return float_from_fp16(static_cast<const uint16_t*>(values)[index]);
    case CX_SCALE_BF16:
      return float_from_bf16(static_cast<const uint16_t*>(values)[index]);
    case CX_SCALE_E4M4:
      return float_from_e4m4(static_cast<const uint8_t*>(values)[index]);
    case CX_SCALE_E4M3:
      return float_from_e4m3(static_cast<const uint8_t*>(values)[index]);
    case CX_SCALE_E8M0:
      return float_from_e8m0(static_cast<const uint8_t*>(values)[index]);
    case CX_SCALE_NESTED:
      return static_cast<const uint8_t*>(values)[index];
  }
  return 0;
}

double read_scale(const cx_weight& w, int64_t index) {
  const double scale = read_scalar(w.scales, w.scale_type, index);
  if (w.scale_type == CX_SCALE_NESTED) {
    const double absmax = w.nested_absmax[index / kNestedBlock];
    return w.nested_map[static_cast<int>(scale)] * absmax + *w.nested_offset;
  }
  return w.tensor_scale ? scale * *w.tensor_scale : scale;
}

double read_zero(const cx_weight& w, int64_t index) {
  if (w.zero_type == CX_ZERO_NONE) return 0;
  if (w.zero_type == CX_ZERO_INTEGER) return static_cast<const uint8_t*>(w.zeros)[index];
  return read_scalar(w.zeros, w.scale_type, index);
}

}  // namespace

std::vector<double> dequantize_reference(const cx_weight& w) {
  cx_format_info format;
  cutlass_ext::check(cx_get_format(w.format, &format));
  const float* codebook = w.codebook ? w.codebook : format.codebook;
  const bool flat = format.flat_blocks && w.k % w.group_size != 0;
  const int64_t groups = (w.k + w.group_size - 1) / w.group_size;
  const int64_t row_bytes = (w.k * format.bits + 7) / 8;

  std::vector<double> out(static_cast<size_t>(w.n * w.k));
  for (int64_t n = 0; n < w.n; ++n) {
    const uint8_t* row = static_cast<const uint8_t*>(w.codes) + n * row_bytes;
    for (int64_t k = 0; k < w.k; ++k) {
      const int64_t group = flat ? (n * w.k + k) / w.group_size : n * groups + k / w.group_size;
      const double value = decode(read_code(row, k * format.bits, format.bits), format, codebook);
      out[static_cast<size_t>(n * w.k + k)] = (value - read_zero(w, group)) * read_scale(w, group);
    }
  }
  return out;
}

std::vector<double> linear_reference(const std::vector<float>& x, int64_t m, const std::vector<double>& weight,
                                     int64_t n, int64_t k, const std::vector<float>& bias) {
  std::vector<double> y(static_cast<size_t>(m * n));
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = bias.empty() ? 0 : bias[static_cast<size_t>(j)];
      for (int64_t l = 0; l < k; ++l) {
        sum += double{x[static_cast<size_t>(i * k + l)]} * weight[static_cast<size_t>(j * k + l)];
      }
      y[static_cast<size_t>(i * n + j)] = sum;
    }
  }
  return y;
}
