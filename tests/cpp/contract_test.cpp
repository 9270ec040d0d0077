// Runs the C API over every format, scale, zero point and instance on small odd shapes and compares with a reference in
// double. Buffers are exactly as large as the API asks for, so that AddressSanitizer sees any access beyond them.
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cutlass_ext/cutlass_ext.h"

namespace {

std::mt19937 generator(0);
int checks = 0;
constexpr uint8_t kPoison = 0x7B;

void expect(bool ok, const std::string& what) {
  ++checks;
  if (ok) return;
  std::fprintf(stderr, "FAILED: %s (the library's last error: %s)\n", what.c_str(), cx_last_error());
  std::exit(1);
}

float random_float() { return std::normal_distribution<float>()(generator); }
uint8_t random_byte() { return static_cast<uint8_t>(generator()); }

uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

float from_bf16(uint16_t value) {
  const uint32_t bits = uint32_t{value} << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

float from_fp16(uint16_t h) {
  const int exponent = h >> 10 & 31;
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(h & 1023), -24)
                                        : std::ldexp(static_cast<float>(1024 + (h & 1023)), exponent - 25);
  return (h & 0x8000) != 0 ? -magnitude : magnitude;
}

// A canonical weight with random contents.
struct Canonical {
  cx_weight w{};
  std::vector<uint8_t> codes, scales, zeros;
  std::vector<float> codebook, map, absmax;
  float offset = 3.0f, tensor_scale = 0.37f;
  cx_format_info format{};

  Canonical(int id, cx_scale_type scale, cx_zero_type zero, int64_t n, int64_t k, int64_t group) {
    expect(cx_get_format(id, &format) == CX_OK, "cx_get_format");
    w.format = id;
    w.layout = CX_CANONICAL;
    w.scale_type = scale;
    w.zero_type = zero;
    w.n = n;
    w.k = k;
    w.group_size = group;
    cx_weight_sizes sizes;
    expect(cx_weight_bytes(&w, &sizes) == CX_OK, "cx_weight_bytes");
    codes.resize(sizes.codes_bytes);
    for (auto& byte : codes) byte = random_byte();
    fill_scales(sizes.scales_bytes);
    zeros.resize(sizes.zeros_bytes);
    fill_zeros();
    w.codes = codes.data();
    w.scales = scales.data();
    w.zeros = zero == CX_ZERO_NONE ? nullptr : zeros.data();
    w.codes_bytes = codes.size();
    w.scales_bytes = scales.size();
    w.zeros_bytes = zeros.size();
    if (format.is_codebook && format.codebook == nullptr) {
      for (int i = 0; i < 1 << format.bits; ++i) codebook.push_back(random_float());
      w.codebook = codebook.data();
    }
    if (scale == CX_SCALE_NESTED) {
      for (int i = 0; i < 256; ++i) map.push_back(random_float());
      for (int64_t i = 0; i < sizes.nested_absmax_count; ++i) absmax.push_back(std::fabs(random_float()) * 0.1f);
      w.nested_map = map.data();
      w.nested_absmax = absmax.data();
      w.nested_absmax_count = sizes.nested_absmax_count;
      w.nested_offset = &offset;
    }
    if (format.tensor_scale) w.tensor_scale = &tensor_scale;
  }

  void fill_scales(size_t bytes) {
    scales.resize(bytes);
    for (size_t i = 0; i < bytes; ++i) {
      if (w.scale_type == CX_SCALE_FP32 && i % 4 == 0) {
        const float value = 0.01f + std::fabs(random_float());
        std::memcpy(&scales[i], &value, 4);
      } else if ((w.scale_type == CX_SCALE_FP16 || w.scale_type == CX_SCALE_BF16) && i % 2 == 0) {
        const uint16_t value = w.scale_type == CX_SCALE_FP16 ? static_cast<uint16_t>(0x2C00 + generator() % 0x1000)
                                                             : to_bf16(0.01f + std::fabs(random_float()));
        std::memcpy(&scales[i], &value, 2);
      } else if (w.scale_type == CX_SCALE_E8M0) {
        scales[i] = static_cast<uint8_t>(120 + generator() % 16);
      } else if (w.scale_type == CX_SCALE_E4M3) {
        scales[i] = static_cast<uint8_t>(generator() % 0x7F);  // neither negative nor NaN
      } else if (w.scale_type == CX_SCALE_E4M4 || w.scale_type == CX_SCALE_NESTED) {
        scales[i] = random_byte();
      }
    }
  }

  void fill_zeros() {
    if (w.zero_type == CX_ZERO_INTEGER) {
      for (auto& zero : zeros) zero = static_cast<uint8_t>(generator() % 17);
    } else if (w.zero_type == CX_ZERO_FLOAT) {
      for (size_t i = 0; i < zeros.size(); i += w.scale_type == CX_SCALE_FP32 ? 4 : 2) {
        const float value = static_cast<float>(generator() % 30) / 2;
        const uint16_t half = w.scale_type == CX_SCALE_BF16 ? to_bf16(value) : 0x4700;  // fp16 7.0
        if (w.scale_type == CX_SCALE_FP32) {
          std::memcpy(&zeros[i], &value, 4);
        } else {
          std::memcpy(&zeros[i], &half, 2);
        }
      }
    }
  }

  int64_t groups() const { return (w.k + w.group_size - 1) / w.group_size; }
  bool flat() const { return format.flat_blocks && w.k % w.group_size != 0; }
  int64_t block(int64_t n, int64_t k) const {
    return flat() ? (n * w.k + k) / w.group_size : n * groups() + k / w.group_size;
  }

  double stored_float(const std::vector<uint8_t>& bytes, int64_t i) const {
    if (w.scale_type == CX_SCALE_FP32) {
      float value;
      std::memcpy(&value, &bytes[static_cast<size_t>(i) * 4], 4);
      return value;
    }
    uint16_t half;
    std::memcpy(&half, &bytes[static_cast<size_t>(i) * 2], 2);
    return w.scale_type == CX_SCALE_FP16 ? from_fp16(half) : from_bf16(half);
  }

  double scale(int64_t i) const {
    const auto at = static_cast<size_t>(i);
    switch (w.scale_type) {
      case CX_SCALE_E4M4: {
        const int e = scales[at] >> 4, m = scales[at] & 15;
        return e == 0 ? std::ldexp(m, -14) : std::ldexp(16 + m, e - 15);
      }
      case CX_SCALE_E4M3: {
        const int e = scales[at] >> 3 & 15, m = scales[at] & 7;
        return (e == 0 ? std::ldexp(m, -9) : std::ldexp(8 + m, e - 10)) * static_cast<double>(tensor_scale);
      }
      case CX_SCALE_E8M0:
        return std::ldexp(1.0, scales[at] - 127);
      case CX_SCALE_NESTED:
        return static_cast<double>(map[scales[at]]) * static_cast<double>(absmax[at / 256]) +
               static_cast<double>(offset);
      default:
        return stored_float(scales, i);
    }
  }

  double value(int64_t n, int64_t k) const {
    const int64_t row_bytes = (w.k * format.bits + 7) / 8;
    unsigned code = 0;
    for (int bit = 0; bit < format.bits; ++bit) {
      const int64_t at = k * format.bits + bit;
      code |= (codes[static_cast<size_t>(n * row_bytes + at / 8)] >> (at % 8) & 1u) << bit;
    }
    const int64_t i = block(n, k);
    double q = code;
    if (format.is_codebook)
      q = static_cast<double>(format.codebook != nullptr ? format.codebook[code] : codebook[code]);
    if (format.is_signed && (code >> (format.bits - 1)) != 0) q -= 1 << format.bits;
    if (w.zero_type == CX_ZERO_INTEGER) q -= zeros[static_cast<size_t>(i)];
    if (w.zero_type == CX_ZERO_FLOAT) q -= stored_float(zeros, i);
    return q * scale(i);
  }
};

// The buffers of a weight in the other layout.
struct Buffers {
  std::vector<uint8_t> codes, scales, zeros;
  cx_weight w;
  Buffers(const cx_weight& like, cx_layout layout) : w(like) {
    w.layout = layout;
    cx_weight_sizes sizes;
    expect(cx_weight_bytes(&w, &sizes) == CX_OK, "cx_weight_bytes");
    codes.assign(sizes.codes_bytes, 0xAA);
    scales.assign(sizes.scales_bytes, 0xAA);
    zeros.assign(sizes.zeros_bytes, 0xAA);
    w.codes = codes.data();
    w.scales = scales.data();
    w.zeros = zeros.empty() ? nullptr : zeros.data();
    w.codes_bytes = codes.size();
    w.scales_bytes = scales.size();
    w.zeros_bytes = zeros.size();
  }
};

void check_gemm(const cx_weight& packed, const std::vector<double>& exact, int64_t m, bool bf16, int instance,
                const std::string& name) {
  const int64_t n = packed.n, k = packed.k, ldx = k + 3, ldy = n + 5;
  const size_t element = bf16 ? 2 : 4;
  std::vector<float> x(static_cast<size_t>((m - 1) * ldx + k)), bias(static_cast<size_t>(n));
  for (auto& v : x) v = from_bf16(to_bf16(random_float()));
  for (auto& v : bias) v = from_bf16(to_bf16(random_float()));
  const auto stored = [&](const std::vector<float>& values) {
    std::vector<uint8_t> bytes(values.size() * element);
    for (size_t i = 0; i < values.size(); ++i) {
      const uint16_t half = to_bf16(values[i]);
      std::memcpy(&bytes[i * element], bf16 ? static_cast<const void*>(&half) : &values[i], element);
    }
    return bytes;
  };
  const std::vector<uint8_t> x_bytes = stored(x), bias_bytes = stored(bias);
  std::vector<uint8_t> y(static_cast<size_t>((m - 1) * ldy + n) * element, kPoison);
  cx_gemm_args args{};
  args.weight = &packed;
  args.dtype = bf16 ? CX_BF16 : CX_FP32;
  args.m = m;
  args.x = x_bytes.data();
  args.ldx = ldx;
  args.y = y.data();
  args.ldy = ldy;
  args.bias = bias_bytes.data();
  args.instance = instance;
  args.threads = 2;
  expect(cx_gemm_workspace(&args, &args.workspace_bytes) == CX_OK, name);
  // Rounded up because aligned_alloc asks for it; the kernels ask for multiples of the alignment anyway.
  args.workspace = std::aligned_alloc(64, (args.workspace_bytes + 64) / 64 * 64);
  expect(cx_gemm(&args) == CX_OK, name);
  std::free(args.workspace);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double ref = static_cast<double>(bias[static_cast<size_t>(j)]);
      double magnitude = std::fabs(ref);  // what fp32 accumulation may round: products of any sign
      for (int64_t l = 0; l < k; ++l) {
        const double product =
            static_cast<double>(x[static_cast<size_t>(i * ldx + l)]) * exact[static_cast<size_t>(j * k + l)];
        ref += product;
        magnitude += std::fabs(product);
      }
      float got;
      uint16_t half;
      const uint8_t* at = &y[static_cast<size_t>(i * ldy + j) * element];
      std::memcpy(&got, at, bf16 ? 2 : 4);
      std::memcpy(&half, at, 2);
      if (bf16) got = from_bf16(half);
      const double error = std::fabs(static_cast<double>(got) - ref);
      const double allowed = 1e-6 * magnitude + (bf16 ? std::ldexp(std::fabs(ref), -8) : 0.0);
      ++checks;
      if (error <= allowed) continue;
      char text[96];
      std::snprintf(text, sizeof text, ": y[%" PRId64 ", %" PRId64 "] is off by %.2e of %.2e", i, j, error, magnitude);
      expect(false, name + text);
    }
    // The gap between the rows was not written.
    if (i + 1 == m) break;
    bool untouched = true;
    for (size_t b = static_cast<size_t>(i * ldy + n) * element; b < static_cast<size_t>((i + 1) * ldy) * element; ++b) {
      untouched = untouched && y[b] == kPoison;
    }
    expect(untouched, name + ": wrote between the rows of y");
  }
}

void check_dequantize(const cx_weight& packed, const std::vector<double>& exact, int instance,
                      const std::string& name) {
  std::vector<float> dense(exact.size(), NAN);
  expect(cx_dequantize(&packed, CX_FP32, dense.data(), packed.k, CX_CPU, nullptr, instance, 2) == CX_OK, name);
  for (size_t i = 0; i < dense.size(); ++i) {
    ++checks;
    const bool close = std::fabs(static_cast<double>(dense[i]) - exact[i]) <= 3e-7 * (1 + std::fabs(exact[i]));
    if (!close) expect(false, name + ": dequantize");
  }
}

void check_weight(int id, cx_scale_type scale, cx_zero_type zero, int64_t n, int64_t k, int64_t group) {
  const Canonical canonical(id, scale, zero, n, k, group);
  char name[160];
  std::snprintf(name, sizeof name, "%s scale %d zero %d N=%" PRId64 " K=%" PRId64 " group %" PRId64,
                canonical.format.name, scale, zero, n, k, group);
  Buffers packed(canonical.w, CX_PACKED);
  expect(cx_pack(&canonical.w, &packed.w, CX_CPU, nullptr) == CX_OK, name);
  Buffers back(canonical.w, CX_CANONICAL);
  expect(cx_unpack(&packed.w, &back.w, CX_CPU, nullptr) == CX_OK, name);
  expect(back.codes == canonical.codes && back.scales == canonical.scales && back.zeros == canonical.zeros,
         std::string(name) + ": unpack(pack(w)) is not w");

  std::vector<double> exact(static_cast<size_t>(n * k));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < k; ++j) exact[static_cast<size_t>(i * k + j)] = canonical.value(i, j);
  }
  int ran = 0;
  int dequantized = 0;
  for (int instance = 0; instance < cx_instance_count(); ++instance) {
    cx_instance_info info;
    expect(cx_get_instance(instance, &info) == CX_OK, "cx_get_instance");
    if (!info.available) continue;
    const std::string what = std::string(name) + " " + info.name;
    if (std::strstr(info.name, "dequant") != nullptr) {
      check_dequantize(packed.w, exact, instance, what);
      ++dequantized;
      continue;
    }
    for (const int64_t m : {1, 3, 9}) {
      for (const bool bf16 : {false, true}) {
        check_gemm(packed.w, exact, m, bf16, instance, what);
        ++ran;
      }
    }
  }
  expect(ran > 0 && dequantized > 0, "no GEMM or no dequant instance ran");
}

}  // namespace

int main() {
  struct Shape {
    int64_t n, k;
  };
  const Shape shapes[] = {{1, 1}, {3, 63}, {65, 130}, {70, 64}};
  int combinations = 0;
  for (int id = 0; id < cx_format_count(); ++id) {
    cx_format_info format;
    expect(cx_get_format(id, &format) == CX_OK, "cx_get_format");
    for (int scale = 0; scale <= CX_SCALE_NESTED; ++scale) {
      for (int zero = 0; zero <= CX_ZERO_FLOAT; ++zero) {
        if ((format.scale_types >> scale & 1) == 0 || (format.zero_types >> zero & 1) == 0) continue;
        for (const Shape shape : shapes) {
          for (const int64_t group : {int64_t{16}, int64_t{32}, int64_t{64}, shape.k}) {
            cx_weight spec{};
            spec.format = id;
            spec.scale_type = static_cast<cx_scale_type>(scale);
            spec.zero_type = static_cast<cx_zero_type>(zero);
            spec.n = shape.n;
            spec.k = shape.k;
            spec.group_size = group;
            cx_weight_sizes sizes;
            if (cx_weight_bytes(&spec, &sizes) != CX_OK) continue;  // a group size that the format does not have
            check_weight(id, spec.scale_type, spec.zero_type, shape.n, shape.k, group);
            ++combinations;
          }
        }
      }
    }
  }
  expect(combinations >= 4 * cx_format_count(), "fewer weights than formats and shapes");
  std::printf("%d checks on %d weights passed\n", checks, combinations);
}
