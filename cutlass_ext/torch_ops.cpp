// The torch operators, on the LibTorch Stable ABI: the only file that includes torch. Tensors become the structs of
// the C API; checks and kernels live behind it. Fake kernels and autograd are in pyquant/ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cutlass_ext/cutlass_ext.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(cx_status status) {
  if (status != CX_OK) throw std::runtime_error(cx_last_error());
}

[[noreturn]] void fail(const std::string& message) { throw std::runtime_error(message); }

cx_dtype dtype_of(const Tensor& x, const char* function, const char* argument) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return CX_FP32;
    case ScalarType::Half: return CX_FP16;
    case ScalarType::BFloat16: return CX_BF16;
    default: fail(std::string(function) + ": " + argument + ": expected Float, Half or BFloat16, got " +
                  torch::headeronly::toString(x.scalar_type()));
  }
}

ScalarType scalar_type(cx_dtype dtype) {
  return dtype == CX_FP32 ? ScalarType::Float : dtype == CX_FP16 ? ScalarType::Half : ScalarType::BFloat16;
}

ScalarType scale_scalar_type(int64_t scale_type) {
  return scale_type <= CX_SCALE_BF16 ? scalar_type(static_cast<cx_dtype>(scale_type)) : ScalarType::Byte;
}

void check_tensor(const char* function, const char* argument, const Tensor& t, ScalarType type) {
  if (t.scalar_type() == type && t.is_contiguous() && t.is_cpu()) return;
  fail(std::string(function) + ": " + argument + ": expected a contiguous CPU tensor of " +
       torch::headeronly::toString(type) + ", got " + (t.is_contiguous() ? "" : "a non-contiguous ") +
       (t.is_cpu() ? "CPU" : "CUDA") + " tensor of " + torch::headeronly::toString(t.scalar_type()));
}

const float* optional_floats(const char* function, const char* argument, const std::optional<Tensor>& t, int64_t numel) {
  if (!t.has_value()) return nullptr;
  check_tensor(function, argument, *t, ScalarType::Float);
  if (t->numel() != numel) {
    fail(std::string(function) + ": " + argument + ": expected " + std::to_string(numel) + " values, got " +
         std::to_string(t->numel()));
  }
  return static_cast<const float*>(t->const_data_ptr());
}

Tensor empty(std::vector<int64_t> sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  // The shim itself: torch::stable::empty goes through the dispatcher by name, 1 us a call.
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), torch::stable::detail::to<int32_t>(
          torch::stable::detail::from(type)), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// The tensors of a weight, in the order of the operators' schemas, and its integers.
struct WeightArguments {
  const Tensor& codes;
  const Tensor& scales;
  const std::optional<Tensor>& zeros;
  const std::optional<Tensor>& codebook;
  const std::optional<Tensor>& nested_map;
  const std::optional<Tensor>& nested_absmax;
  const std::optional<Tensor>& nested_offset;
  const std::optional<Tensor>& tensor_scale;
  int64_t format, scale_type, zero_type, group_size, n, k;
};

cx_weight to_weight(const char* function, cx_layout layout, const WeightArguments& a) {
  cx_weight w{};
  w.format = static_cast<int32_t>(a.format);
  w.layout = layout;
  w.scale_type = static_cast<cx_scale_type>(a.scale_type);
  w.zero_type = static_cast<cx_zero_type>(a.zero_type);
  w.n = a.n;
  w.k = a.k;
  w.group_size = a.group_size;
  const ScalarType scale = scale_scalar_type(a.scale_type);
  check_tensor(function, "codes", a.codes, ScalarType::Byte);
  check_tensor(function, "scales", a.scales, scale);
  // The C API's structs have mutable pointers because cx_pack writes through them; here they are read.
  w.codes = const_cast<void*>(a.codes.const_data_ptr());
  w.scales = const_cast<void*>(a.scales.const_data_ptr());
  w.codes_bytes = static_cast<size_t>(a.codes.numel());
  w.scales_bytes = static_cast<size_t>(a.scales.numel()) * a.scales.element_size();
  if (a.zeros.has_value()) {
    check_tensor(function, "zeros", *a.zeros, a.zero_type == CX_ZERO_INTEGER ? ScalarType::Byte : scale);
    w.zeros = const_cast<void*>(a.zeros->const_data_ptr());
    w.zeros_bytes = static_cast<size_t>(a.zeros->numel()) * a.zeros->element_size();
  }
  cx_format_info info;
  check(cx_get_format(w.format, &info));
  w.codebook = optional_floats(function, "codebook", a.codebook, int64_t{1} << info.bits);
  w.nested_map = optional_floats(function, "nested_map", a.nested_map, 256);
  w.nested_absmax_count = a.nested_absmax.has_value() ? a.nested_absmax->numel() : 0;
  w.nested_absmax = optional_floats(function, "nested_absmax", a.nested_absmax, w.nested_absmax_count);
  w.nested_offset = optional_floats(function, "nested_offset", a.nested_offset, 1);
  w.tensor_scale = optional_floats(function, "tensor_scale", a.tensor_scale, 1);
  return w;
}

// A buffer of the calling thread, grown as needed: CPU kernels bound their workspace, so it stays small.
void* thread_workspace(size_t bytes) {
  constexpr size_t kAlignment = 64;
  thread_local std::unique_ptr<void, decltype(&std::free)> buffer(nullptr, &std::free);
  thread_local size_t size = 0;
  if (size < bytes) {
    buffer.reset();
    size = 0;
    const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    buffer.reset(std::aligned_alloc(kAlignment, rounded));
    if (buffer == nullptr) fail("gemm: workspace: cannot allocate " + std::to_string(rounded) + " bytes");
    size = rounded;
  }
  return buffer.get();
}

// A weight in an operator's C++ signature and in its schema; the order is that of PackedWeight.op_arguments.
#define CX_TENSOR_PARAMETERS                                                                              \
  const Tensor &codes, const Tensor &scales, std::optional<Tensor> zeros, std::optional<Tensor> codebook, \
      std::optional<Tensor> nested_map, std::optional<Tensor> nested_absmax,                              \
      std::optional<Tensor> nested_offset, std::optional<Tensor> tensor_scale
#define CX_SPEC_PARAMETERS \
  int64_t format, int64_t scale_type, int64_t zero_type, int64_t group_size, int64_t n, int64_t k
#define CX_WEIGHT_ARGUMENTS                                                                                \
  {codes,  scales,     zeros,     codebook,   nested_map, nested_absmax, nested_offset, tensor_scale,      \
   format, scale_type, zero_type, group_size, n,          k}
#define CX_TENSOR_SCHEMA                                                                                      \
  "Tensor codes, Tensor scales, Tensor? zeros, Tensor? codebook, Tensor? nested_map, Tensor? nested_absmax, " \
  "Tensor? nested_offset, Tensor? tensor_scale, "
#define CX_SPEC_SCHEMA "int format, int scale_type, int zero_type, int group_size, int n, int k"

Tensor gemm(const Tensor& x_in, CX_TENSOR_PARAMETERS, std::optional<Tensor> bias, CX_SPEC_PARAMETERS,
            int64_t instance) {
  const cx_weight weight = to_weight("gemm", CX_PACKED, CX_WEIGHT_ARGUMENTS);
  const int64_t dims = x_in.dim();
  if (dims < 1 || x_in.size(dims - 1) != k) {
    const std::string got = dims < 1 ? "a scalar" : "K=" + std::to_string(x_in.size(dims - 1));
    fail("gemm: x has " + got + ", the weight has K=" + std::to_string(k));
  }
  // A matrix may have any row stride; other strides are made contiguous.
  const bool rows = dims == 2 && x_in.stride(1) == 1;
  const Tensor x = rows || x_in.is_contiguous() ? x_in : torch::stable::contiguous(x_in);
  std::vector<int64_t> sizes(static_cast<size_t>(dims));
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < dims; ++i) m *= sizes[static_cast<size_t>(i)] = x.size(i);
  sizes.back() = n;

  cx_gemm_args args{};
  args.weight = &weight;
  args.dtype = dtype_of(x, "gemm", "x");
  if (bias.has_value()) {
    if (bias->dim() != 1 || bias->size(0) != n) {
      fail("gemm: bias: expected shape [N=" + std::to_string(n) + "], got " + std::to_string(bias->numel()) +
           " values in " + std::to_string(bias->dim()) + " dimensions");
    }
    check_tensor("gemm", "bias", *bias, x.scalar_type());
    args.bias = bias->const_data_ptr();
  }
  Tensor y = empty(std::move(sizes), x.scalar_type());
  if (m == 0) return y;
  args.m = m;
  args.x = x.const_data_ptr();
  args.ldx = rows ? x.stride(0) : k;
  args.y = y.mutable_data_ptr();
  args.ldy = n;
  args.device = CX_CPU;
  args.instance = static_cast<int32_t>(instance);
  args.threads = static_cast<int32_t>(torch::stable::get_num_threads());
  check(cx_gemm_workspace(&args, &args.workspace_bytes));
  if (args.workspace_bytes > 0) args.workspace = thread_workspace(args.workspace_bytes);
  check(cx_gemm(&args));
  return y;
}

Tensor dequantize(CX_TENSOR_PARAMETERS, CX_SPEC_PARAMETERS, int64_t dtype) {
  const cx_weight weight = to_weight("dequantize", CX_PACKED, CX_WEIGHT_ARGUMENTS);
  if (dtype < CX_FP32 || dtype > CX_BF16) fail("dequantize: dtype: expected 0, 1 or 2, got " + std::to_string(dtype));
  Tensor out = empty({n, k}, scalar_type(static_cast<cx_dtype>(dtype)));
  check(cx_dequantize(&weight, static_cast<cx_dtype>(dtype), out.mutable_data_ptr(), k, CX_CPU, nullptr,
                      static_cast<int32_t>(torch::stable::get_num_threads())));
  return out;
}

// pack and unpack: codes, scales and zeros (empty without zeros) in the other layout.
std::tuple<Tensor, Tensor, Tensor> convert(const char* function, cx_layout from_layout, const WeightArguments& a) {
  const cx_weight from = to_weight(function, from_layout, a);
  cx_weight to = from;
  to.layout = from_layout == CX_CANONICAL ? CX_PACKED : CX_CANONICAL;
  cx_weight_sizes sizes;
  check(cx_weight_bytes(&to, &sizes));
  const auto count = [](size_t bytes, const Tensor& like) { return static_cast<int64_t>(bytes / like.element_size()); };
  Tensor codes = empty({static_cast<int64_t>(sizes.codes_bytes)}, ScalarType::Byte);
  Tensor scales = empty({count(sizes.scales_bytes, a.scales)}, a.scales.scalar_type());
  Tensor zeros = a.zeros.has_value() ? empty({count(sizes.zeros_bytes, *a.zeros)}, a.zeros->scalar_type())
                                     : empty({0}, ScalarType::Byte);
  to.codes = codes.mutable_data_ptr();
  to.scales = scales.mutable_data_ptr();
  to.zeros = a.zeros.has_value() ? zeros.mutable_data_ptr() : nullptr;
  to.codes_bytes = sizes.codes_bytes;
  to.scales_bytes = sizes.scales_bytes;
  to.zeros_bytes = sizes.zeros_bytes;
  check(from_layout == CX_CANONICAL ? cx_pack(&from, &to, CX_CPU, nullptr) : cx_unpack(&from, &to, CX_CPU, nullptr));
  return {codes, scales, zeros};
}

std::tuple<Tensor, Tensor, Tensor> pack(CX_TENSOR_PARAMETERS, CX_SPEC_PARAMETERS) {
  return convert("pack", CX_CANONICAL, CX_WEIGHT_ARGUMENTS);
}

std::tuple<Tensor, Tensor, Tensor> unpack(CX_TENSOR_PARAMETERS, CX_SPEC_PARAMETERS) {
  return convert("unpack", CX_PACKED, CX_WEIGHT_ARGUMENTS);
}

}  // namespace

STABLE_TORCH_LIBRARY(pyquant, m) {
  m.def("gemm(Tensor x, " CX_TENSOR_SCHEMA "Tensor? bias, " CX_SPEC_SCHEMA ", int instance=-1) -> Tensor");
  m.def("dequantize(" CX_TENSOR_SCHEMA CX_SPEC_SCHEMA ", int dtype) -> Tensor");
  m.def("pack(" CX_TENSOR_SCHEMA CX_SPEC_SCHEMA ") -> (Tensor, Tensor, Tensor)");
  m.def("unpack(" CX_TENSOR_SCHEMA CX_SPEC_SCHEMA ") -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyquant, CPU, m) {
  m.impl("gemm", TORCH_BOX(&gemm));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
}
