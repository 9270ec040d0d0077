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

#include "cutlass_ext/cutlass_ext.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] void fail(const std::string& message) { throw std::runtime_error(message); }

// The C API's message, under the operator's name in place of the C function's.
void check(const char* function, cx_status status) {
  if (status == CX_OK) return;
  const std::string message = cx_last_error();
  fail(function + message.substr(message.find(": ")));
}

cx_dtype dtype_of(const Tensor& x, const char* function, const char* argument) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return CX_FP32;
    case ScalarType::Half:
      return CX_FP16;
    case ScalarType::BFloat16:
      return CX_BF16;
    default:
      fail(std::string(function) + ": " + argument + ": expected Float, Half or BFloat16, got " +
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

void check_numel(const char* function, const char* argument, const Tensor& t, int64_t numel) {
  if (t.numel() == numel) return;
  fail(std::string(function) + ": " + argument + ": expected " + std::to_string(numel) + " values, got " +
       std::to_string(t.numel()));
}

// The shape of a contiguous tensor, on the stack.
struct Shape {
  static constexpr int64_t kMaxDims = 16;
  int64_t dims = 0;
  int64_t sizes[kMaxDims];
  void push(int64_t size) { sizes[dims++] = size; }
};

Tensor empty(const Shape& shape, ScalarType type) {
  int64_t strides[Shape::kMaxDims];
  for (int64_t i = shape.dims, stride = 1; i-- > 0; stride *= shape.sizes[i]) strides[i] = stride;
  // The shim itself: torch::stable::empty goes through the dispatcher by name, 1 us a call.
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.dims, shape.sizes, strides,
                                                  torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty(int64_t numel, ScalarType type) {
  Shape shape;
  shape.push(numel);
  return empty(shape, type);
}

// A weight as the operators take it. Every argument of a call costs the host about half a microsecond, so what
// describes the weight is folded into few of them.
struct WeightArguments {
  const Tensor& codes;
  const Tensor& scales;
  const std::optional<Tensor>& zeros;
  const std::optional<Tensor>& codebook;
  // fp32: tensor_scale [1], or for nested scales nested_offset [1], nested_map [256] and nested_absmax, one behind the
  // other.
  const std::optional<Tensor>& scale_data;
  int64_t spec;  // format | scale type << 8 | zero type << 12 | group size << 16; pyquant.ops.encode_spec
  int64_t n;
  int64_t k;
};

constexpr int64_t kNestedMapSize = 256;

cx_weight to_weight(const char* function, cx_layout layout, const WeightArguments& a) {
  cx_weight w{};
  w.format = static_cast<int32_t>(a.spec & 0xFF);
  w.layout = layout;
  w.scale_type = static_cast<cx_scale_type>(a.spec >> 8 & 0xF);
  w.zero_type = static_cast<cx_zero_type>(a.spec >> 12 & 0xF);
  w.group_size = a.spec >> 16;
  w.n = a.n;
  w.k = a.k;
  cx_weight_sizes sizes;  // also checks format, types, shape and group size
  check(function, cx_weight_bytes(&w, &sizes));
  const ScalarType scale = scale_scalar_type(w.scale_type);
  check_tensor(function, "codes", a.codes, ScalarType::Byte);
  check_tensor(function, "scales", a.scales, scale);
  // The C API's structs have mutable pointers because cx_pack writes through them; here they are read.
  w.codes = const_cast<void*>(a.codes.const_data_ptr());
  w.scales = const_cast<void*>(a.scales.const_data_ptr());
  w.codes_bytes = static_cast<size_t>(a.codes.numel());
  w.scales_bytes = static_cast<size_t>(a.scales.numel()) * a.scales.element_size();
  if (a.zeros.has_value()) {
    check_tensor(function, "zeros", *a.zeros, w.zero_type == CX_ZERO_INTEGER ? ScalarType::Byte : scale);
    w.zeros = const_cast<void*>(a.zeros->const_data_ptr());
    w.zeros_bytes = static_cast<size_t>(a.zeros->numel()) * a.zeros->element_size();
  }
  if (a.codebook.has_value()) {
    cx_format_info info;
    check(function, cx_get_format(w.format, &info));
    check_tensor(function, "codebook", *a.codebook, ScalarType::Float);
    check_numel(function, "codebook", *a.codebook, int64_t{1} << info.bits);
    w.codebook = static_cast<const float*>(a.codebook->const_data_ptr());
  }
  if (a.scale_data.has_value()) {
    check_tensor(function, "scale_data", *a.scale_data, ScalarType::Float);
    const float* data = static_cast<const float*>(a.scale_data->const_data_ptr());
    if (w.scale_type == CX_SCALE_NESTED) {
      check_numel(function, "scale_data", *a.scale_data, 1 + kNestedMapSize + sizes.nested_absmax_count);
      w.nested_offset = data;
      w.nested_map = data + 1;
      w.nested_absmax = data + 1 + kNestedMapSize;
      w.nested_absmax_count = sizes.nested_absmax_count;
    } else {
      check_numel(function, "scale_data", *a.scale_data, 1);
      w.tensor_scale = data;
    }
  }
  return w;
}

// A buffer of the calling thread, grown as needed: CPU kernels bound their workspace, so it stays small.
struct Workspace {
  std::unique_ptr<void, decltype(&std::free)> data{nullptr, &std::free};
  size_t bytes = 0;

  void grow(size_t wanted) {
    constexpr size_t kAlignment = 64;
    const size_t rounded = (wanted + kAlignment - 1) / kAlignment * kAlignment;
    data.reset(std::aligned_alloc(kAlignment, rounded));
    bytes = data == nullptr ? 0 : rounded;
    if (data == nullptr) fail("gemm: workspace: cannot allocate " + std::to_string(rounded) + " bytes");
  }
};

Workspace& thread_workspace() {
  thread_local Workspace workspace;
  return workspace;
}

// A weight in an operator's C++ signature and in its schema.
#define CX_TENSOR_PARAMETERS                                                                              \
  const Tensor &codes, const Tensor &scales, std::optional<Tensor> zeros, std::optional<Tensor> codebook, \
      std::optional<Tensor> scale_data
#define CX_SPEC_PARAMETERS int64_t spec, int64_t n, int64_t k
#define CX_WEIGHT_ARGUMENTS {codes, scales, zeros, codebook, scale_data, spec, n, k}
#define CX_TENSOR_SCHEMA "Tensor codes, Tensor scales, Tensor? zeros, Tensor? codebook, Tensor? scale_data, "
#define CX_SPEC_SCHEMA "int spec, int n, int k"

Tensor run_gemm(const Tensor& x_in, const cx_weight& weight, const std::optional<Tensor>& bias, int32_t instance) {
  const int64_t n = weight.n, k = weight.k;
  const int64_t dims = x_in.dim();
  if (dims > Shape::kMaxDims) fail("gemm: x: expected at most 16 dimensions, got " + std::to_string(dims));
  if (dims < 1 || x_in.size(dims - 1) != k) {
    const std::string got = dims < 1 ? "a scalar" : "K=" + std::to_string(x_in.size(dims - 1));
    fail("gemm: x has " + got + ", the weight has K=" + std::to_string(k));
  }
  // A matrix may have any row stride, but for rows that overlap; other strides are made contiguous.
  const bool rows = dims == 2 && x_in.stride(1) == 1 && (x_in.stride(0) >= k || x_in.stride(0) == 0);
  const Tensor x = rows || x_in.is_contiguous() ? x_in : torch::stable::contiguous(x_in);
  Shape shape;
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < dims; ++i) {
    shape.push(x.size(i));
    m *= shape.sizes[i];
  }
  shape.push(n);

  cx_gemm_args args{};
  args.weight = &weight;
  args.dtype = dtype_of(x, "gemm", "x");
  std::optional<Tensor> dense_bias;
  if (bias.has_value()) {
    if (bias->dim() != 1 || bias->size(0) != n) {
      fail("gemm: bias: expected shape [N=" + std::to_string(n) + "], got " + std::to_string(bias->numel()) +
           " values in " + std::to_string(bias->dim()) + " dimensions");
    }
    dense_bias = bias->is_contiguous() ? *bias : torch::stable::contiguous(*bias);
    check_tensor("gemm", "bias", *dense_bias, x.scalar_type());
    args.bias = dense_bias->const_data_ptr();
  }
  Tensor y = empty(shape, x.scalar_type());
  if (m == 0) return y;
  args.m = m;
  args.x = x.const_data_ptr();
  args.ldx = rows ? x.stride(0) : k;
  args.y = y.mutable_data_ptr();
  args.ldy = n;
  args.device = CX_CPU;
  args.instance = instance;
  args.threads = static_cast<int32_t>(torch::stable::get_num_threads());
  // Most calls fit in the workspace of the thread's last one; asking first would check everything twice.
  Workspace& workspace = thread_workspace();
  args.workspace = workspace.data.get();
  args.workspace_bytes = workspace.bytes;
  cx_status status = cx_gemm(&args);
  if (status == CX_WORKSPACE_TOO_SMALL) {
    size_t bytes = 0;
    check("gemm", cx_gemm_workspace(&args, &bytes));
    workspace.grow(bytes);
    args.workspace = workspace.data.get();
    args.workspace_bytes = workspace.bytes;
    status = cx_gemm(&args);
  }
  check("gemm", status);
  return y;
}

Tensor gemm(const Tensor& x, CX_TENSOR_PARAMETERS, std::optional<Tensor> bias, CX_SPEC_PARAMETERS) {
  return run_gemm(x, to_weight("gemm", CX_PACKED, CX_WEIGHT_ARGUMENTS), bias, -1);
}

Tensor gemm_instance(const Tensor& x, CX_TENSOR_PARAMETERS, std::optional<Tensor> bias, CX_SPEC_PARAMETERS,
                     int64_t instance) {
  if (instance < 0 || instance >= cx_instance_count()) {
    fail("gemm: instance: expected 0.." + std::to_string(cx_instance_count() - 1) + ", got " +
         std::to_string(instance));
  }
  return run_gemm(x, to_weight("gemm", CX_PACKED, CX_WEIGHT_ARGUMENTS), bias, static_cast<int32_t>(instance));
}

Tensor dequantize(CX_TENSOR_PARAMETERS, CX_SPEC_PARAMETERS, int64_t dtype) {
  const cx_weight weight = to_weight("dequantize", CX_PACKED, CX_WEIGHT_ARGUMENTS);
  if (dtype < CX_FP32 || dtype > CX_BF16) fail("dequantize: dtype: expected 0, 1 or 2, got " + std::to_string(dtype));
  Shape shape;
  shape.push(n);
  shape.push(k);
  Tensor out = empty(shape, scalar_type(static_cast<cx_dtype>(dtype)));
  check("dequantize", cx_dequantize(&weight, static_cast<cx_dtype>(dtype), out.mutable_data_ptr(), k, CX_CPU, nullptr,
                                    -1, static_cast<int32_t>(torch::stable::get_num_threads())));
  return out;
}

// pack and unpack: codes, scales and zeros (empty without zeros) in the other layout.
std::tuple<Tensor, Tensor, Tensor> convert(const char* function, cx_layout from_layout, const WeightArguments& a) {
  const cx_weight from = to_weight(function, from_layout, a);
  cx_weight to = from;
  to.layout = from_layout == CX_CANONICAL ? CX_PACKED : CX_CANONICAL;
  cx_weight_sizes sizes;
  check(function, cx_weight_bytes(&to, &sizes));
  const auto count = [](size_t bytes, const Tensor& like) { return static_cast<int64_t>(bytes / like.element_size()); };
  Tensor codes = empty(static_cast<int64_t>(sizes.codes_bytes), ScalarType::Byte);
  Tensor scales = empty(count(sizes.scales_bytes, a.scales), a.scales.scalar_type());
  Tensor zeros = a.zeros.has_value() ? empty(count(sizes.zeros_bytes, *a.zeros), a.zeros->scalar_type())
                                     : empty(0, ScalarType::Byte);
  to.codes = codes.mutable_data_ptr();
  to.scales = scales.mutable_data_ptr();
  to.zeros = a.zeros.has_value() ? zeros.mutable_data_ptr() : nullptr;
  to.codes_bytes = sizes.codes_bytes;
  to.scales_bytes = sizes.scales_bytes;
  to.zeros_bytes = sizes.zeros_bytes;
  check(function,
        from_layout == CX_CANONICAL ? cx_pack(&from, &to, CX_CPU, nullptr) : cx_unpack(&from, &to, CX_CPU, nullptr));
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
  m.def("gemm(Tensor x, " CX_TENSOR_SCHEMA "Tensor? bias, " CX_SPEC_SCHEMA ") -> Tensor");
  // A kernel of the caller's choice, for tests and profiling. Not an argument of gemm, where it would cost every call.
  m.def("gemm_instance(Tensor x, " CX_TENSOR_SCHEMA "Tensor? bias, " CX_SPEC_SCHEMA ", int instance) -> Tensor");
  m.def("dequantize(" CX_TENSOR_SCHEMA CX_SPEC_SCHEMA ", int dtype) -> Tensor");
  m.def("pack(" CX_TENSOR_SCHEMA CX_SPEC_SCHEMA ") -> (Tensor, Tensor, Tensor)");
  m.def("unpack(" CX_TENSOR_SCHEMA CX_SPEC_SCHEMA ") -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyquant, CPU, m) {
  m.impl("gemm", TORCH_BOX(&gemm));
  m.impl("gemm_instance", TORCH_BOX(&gemm_instance));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
}
