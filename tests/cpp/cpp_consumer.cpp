// The C++ wrapper: a packed weight outlives what it was made from, gemm in a kept workspace does not allocate, and
// failures throw an Error that names function and argument.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cutlass_ext/cutlass_ext.hpp>
#include <functional>
#include <new>
#include <string>
#include <utility>
#include <vector>

namespace {

long allocations = 0;  // through operator new, the library's included
int failures = 0;

void expect(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what.c_str());
  ++failures;
}

void expect_error(cx_status status, const std::string& part, const std::function<void()>& call) {
  try {
    call();
    expect(false, part + ": expected an Error");
  } catch (const cutlass_ext::Error& error) {
    expect(error.status() == status && std::string(error.what()).find(part) != std::string::npos,
           part + ": unexpected: " + error.what());
  }
}

constexpr int64_t kN = 70, kK = 96, kM = 3;

// A weight of a codebook format that brings its own codebook and nested scales: all parts that a weight can own.
struct CanonicalWeight {
  std::vector<uint8_t> codes, scales;
  std::vector<float> codebook, nested_map, nested_absmax;
  float nested_offset = 0.5f;
  cx_weight weight{};

  explicit CanonicalWeight(int32_t format) : codebook(16), nested_map(256) {
    weight.format = format;
    weight.layout = CX_CANONICAL;
    weight.scale_type = CX_SCALE_NESTED;
    weight.zero_type = CX_ZERO_NONE;
    weight.n = kN;
    weight.k = kK;
    weight.group_size = 32;
    cx_weight_sizes sizes;
    cutlass_ext::check(cx_weight_bytes(&weight, &sizes));
    codes.resize(weight.codes_bytes = sizes.codes_bytes);
    scales.resize(weight.scales_bytes = sizes.scales_bytes);
    nested_absmax.assign(static_cast<size_t>(weight.nested_absmax_count = sizes.nested_absmax_count), 0.25f);
    for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(i * 7);
    for (size_t i = 0; i < scales.size(); ++i) scales[i] = static_cast<uint8_t>(i * 5);
    for (size_t i = 0; i < 16; ++i) codebook[i] = static_cast<float>(i) / 4 - 2;
    for (size_t i = 0; i < 256; ++i) nested_map[i] = static_cast<float>(i) / 256;
    weight.codes = codes.data();
    weight.scales = scales.data();
    weight.codebook = codebook.data();
    weight.nested_map = nested_map.data();
    weight.nested_absmax = nested_absmax.data();
    weight.nested_offset = &nested_offset;
  }

  float value(int64_t n, int64_t k) const {
    const int64_t index = n * kK + k;
    const int code = codes[static_cast<size_t>(index / 2)] >> 4 * (index % 2) & 15;
    const float scale = nested_map[scales[static_cast<size_t>(index / 32)]] * 0.25f + nested_offset;
    return codebook[static_cast<size_t>(code)] * scale;
  }
};

int32_t find_format() {
  for (const cx_format_info& format : cutlass_ext::formats()) {
    if (format.bits == 4 && format.is_codebook && !format.codebook && format.scale_types >> CX_SCALE_NESTED & 1) {
      return format.id;
    }
  }
  throw std::runtime_error("no 4-bit format with its own codebook and nested scales");
}

void check_gemm() {
  std::vector<float> expected(kN * kK);
  const auto make = [&] {
    const CanonicalWeight canonical(find_format());
    for (int64_t n = 0; n < kN; ++n) {
      for (int64_t k = 0; k < kK; ++k) expected[static_cast<size_t>(n * kK + k)] = canonical.value(n, k);
    }
    return cutlass_ext::PackedWeight(canonical.weight);
  };
  cutlass_ext::PackedWeight first = make();
  const cutlass_ext::PackedWeight packed = std::move(first);

  // The leading dimension is larger than K; what lies between the rows must stay.
  constexpr int64_t kLd = kK + 3;
  std::vector<float> dense(kN * kLd, -7.0f);
  cutlass_ext::dequantize<float>(packed, {dense.data(), kN, kK, kLd});
  for (int64_t n = 0; n < kN; ++n) {
    for (int64_t k = 0; k < kLd; ++k) {
      const float got = dense[static_cast<size_t>(n * kLd + k)];
      const float want = k < kK ? expected[static_cast<size_t>(n * kK + k)] : -7.0f;
      if (std::abs(got - want) > 1e-6f * std::abs(want)) {
        return expect(false, "dequantize at " + std::to_string(n) + ", " + std::to_string(k) + ": expected " +
                                 std::to_string(want) + ", got " + std::to_string(got));
      }
    }
  }

  std::vector<float> x(kM * kK), y(kM * kN), again(kM * kN), bias(kN);
  for (size_t i = 0; i < x.size(); ++i) x[i] = std::sin(static_cast<float>(i));
  for (size_t i = 0; i < bias.size(); ++i) bias[i] = static_cast<float>(i);
  cutlass_ext::Workspace workspace;
  cutlass_ext::gemm<float>(packed, {x.data(), kM, kK}, {y.data(), kM, kN}, bias.data(), workspace);
  const long before = allocations;
  cutlass_ext::gemm<float>(packed, {x.data(), kM, kK}, {again.data(), kM, kN}, bias.data(), workspace);
  const long allocated = allocations - before;
  expect(allocated == 0, "a second gemm allocates nothing");
  expect(y == again, "a second gemm gives the same bits");
  for (int64_t m = 0; m < kM; ++m) {
    for (int64_t n = 0; n < kN; ++n) {
      double sum = bias[static_cast<size_t>(n)];
      for (int64_t k = 0; k < kK; ++k) {
        sum += double{x[static_cast<size_t>(m * kK + k)]} * expected[static_cast<size_t>(n * kK + k)];
      }
      expect(std::abs(y[static_cast<size_t>(m * kN + n)] - sum) < 1e-4, "gemm at " + std::to_string(n));
    }
  }

  // 16-bit elements, in a workspace of the caller.
  std::vector<uint16_t> x16(kM * kK, 0x3f80), y16(kM * kN);  // bf16 ones
  cutlass_ext::Options bf16;
  bf16.dtype = CX_BF16;
  const cutlass_ext::MatrixView<uint16_t> x_view{x16.data(), kM, kK}, y_view{y16.data(), kM, kN};
  const size_t bytes = cutlass_ext::gemm_workspace_bytes(packed, x_view, y_view, nullptr, bf16);
  cutlass_ext::AlignedBuffer buffer = cutlass_ext::make_buffer(bytes);
  cutlass_ext::gemm(packed, x_view, y_view, nullptr, buffer.data(), bytes, bf16);
  double sum = 0;
  for (int64_t k = 0; k < kK; ++k) sum += expected[static_cast<size_t>(k)];
  cutlass_ext::gemm(packed, x_view, y_view, nullptr, workspace, bf16);
  uint32_t bits = uint32_t{y16[0]} << 16;
  float got;
  std::memcpy(&got, &bits, 4);
  expect(std::abs(got - sum) <= std::abs(sum) / 128, "gemm in bf16");

  expect_error(CX_INVALID_ARGUMENT, "gemm: x", [&] {
    cutlass_ext::gemm<float>(packed, {x.data(), kM, kK - 1}, {y.data(), kM, kN}, nullptr, workspace);
  });
  expect_error(CX_INVALID_ARGUMENT, "gemm: y", [&] {
    cutlass_ext::gemm<float>(packed, {x.data(), kM, kK}, {y.data(), kM, kN + 1}, nullptr, workspace);
  });
  expect_error(CX_INVALID_ARGUMENT, "gemm: options.dtype", [&] {
    cutlass_ext::gemm<float>(packed, {x.data(), kM, kK}, {y.data(), kM, kN}, nullptr, workspace, bf16);
  });
  expect_error(CX_INVALID_ARGUMENT, "ldx", [&] {
    cutlass_ext::gemm<float>(packed, {x.data(), kM, kK, 1}, {y.data(), kM, kN}, nullptr, workspace);
  });
  // Transposed, x has N columns and y has K. The CPU has no kernel for that.
  cutlass_ext::Options transposed;
  transposed.flags = CX_GEMM_TRANSPOSED;
  expect_error(CX_INVALID_ARGUMENT, "gemm: x: columns (N): expected 70, got 96", [&] {
    cutlass_ext::gemm<float>(packed, {x.data(), kM, kK}, {y.data(), kM, kN}, nullptr, workspace, transposed);
  });
  expect_error(CX_INVALID_ARGUMENT, "gemm: y: columns (K): expected 96, got 70", [&] {
    cutlass_ext::gemm<float>(packed, {y.data(), kM, kN}, {again.data(), kM, kN}, nullptr, workspace, transposed);
  });
  expect_error(CX_NOT_SUPPORTED, "instance: this build has none for the problem", [&] {
    cutlass_ext::gemm<float>(packed, {y.data(), kM, kN}, {x.data(), kM, kK}, nullptr, workspace, transposed);
  });
  if (bytes > 0) {
    expect_error(CX_WORKSPACE_TOO_SMALL, "workspace",
                 [&] { cutlass_ext::gemm(packed, x_view, y_view, nullptr, buffer.data(), bytes - 1, bf16); });
  }
}

void check_errors() {
  CanonicalWeight canonical(find_format());
  canonical.weight.codebook = nullptr;
  expect_error(CX_INVALID_ARGUMENT, "codebook", [&] { cutlass_ext::PackedWeight packed(canonical.weight); });
  canonical.weight.format = -1;
  expect_error(CX_INVALID_ARGUMENT, "cx_get_format", [&] { cutlass_ext::PackedWeight packed(canonical.weight); });
}

}  // namespace

void* operator new(size_t bytes) {
  ++allocations;
  if (void* p = std::malloc(bytes)) return p;
  throw std::bad_alloc();
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }
void* operator new(size_t bytes, std::align_val_t alignment) {
  ++allocations;
  const auto a = static_cast<size_t>(alignment);
  if (void* p = std::aligned_alloc(a, (bytes + a - 1) / a * a)) return p;
  throw std::bad_alloc();
}
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, size_t, std::align_val_t) noexcept { std::free(p); }

int main() {
  cutlass_ext::check_version();
  expect(!cutlass_ext::instances().empty(), "instances() is not empty");
  check_gemm();
  check_errors();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
