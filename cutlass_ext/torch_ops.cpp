// The torch operators, on the LibTorch Stable ABI: the only file that includes torch. Tensors become the structs of
// the C API; checks and kernels live behind it. Fake kernels and autograd are in pyquant/ops.py.
#include <torch/csrc/stable/accelerator.h>
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

// In libtorch_cuda only; weak, so that the operators also load under a torch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

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

// Where a call runs: the device of its first tensor, and on a GPU torch's current stream there.
struct Place {
  cx_device device = CX_CPU;
  int32_t index = 0;
  void* stream = nullptr;
  std::optional<torch::stable::accelerator::DeviceGuard> guard;

  Place() = default;  // the CPU
  explicit Place(const Tensor& t) {
    if (t.is_cpu()) return;
    device = CX_CUDA;
    index = t.get_device_index();
    guard.emplace(index);
    if (aoti_torch_get_current_cuda_stream == nullptr) fail("pyquant: this torch has no CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  }

  bool holds(const Tensor& t) const {
    return device == CX_CPU ? t.is_cpu() : t.is_cuda() && t.get_device_index() == index;
  }
  std::string name() const { return device == CX_CPU ? "CPU" : "CUDA:" + std::to_string(index); }
};

std::string place_name(const Tensor& t) {
  return t.is_cpu() ? "CPU" : t.is_cuda() ? "CUDA:" + std::to_string(t.get_device_index()) : "another device";
}

void check_tensor(const char* function, const char* argument, const Tensor& t, ScalarType type, const Place& place) {
  if (t.scalar_type() == type && t.is_contiguous() && place.holds(t)) return;
  fail(std::string(function) + ": " + argument + ": expected a contiguous " + place.name() + " tensor of " +
       torch::headeronly::toString(type) + ", got " + (t.is_contiguous() ? "" : "a non-contiguous ") + place_name(t) +
       " tensor of " + torch::headeronly::toString(t.scalar_type()));
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

Tensor empty(const Shape& shape, ScalarType type, const Place& place) {
  int64_t strides[Shape::kMaxDims];
  for (int64_t i = shape.dims, stride = 1; i-- > 0; stride *= shape.sizes[i]) strides[i] = stride;
  // The shim itself: torch::stable::empty goes through the dispatcher by name, 1 us a call.
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      shape.dims, shape.sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      place.device == CX_CPU ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda(), place.index, &handle));
  return Tensor(handle);
}

Tensor empty(int64_t numel, ScalarType type, const Place& place) {
  Shape shape;
  shape.push(numel);
  return empty(shape, type, place);
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
  // format | scale type << 8 | zero type << 12 | group size << 16 (pyquant.ops.encode_spec); that of a gemm may have
  // flags
  int64_t spec;
  int64_t n;
  int64_t k;
};

constexpr int64_t kNestedMapSize = 256;
// Flags in the spec of a gemm, far above any group size: it may use programmatic dependent launch; it is transposed.
constexpr int64_t kProgrammaticLaunch = int64_t{1} << 62;
constexpr int64_t kTransposed = int64_t{1} << 61;

// Takes them off; returns the flags of cx_gemm_args. A negative spec has none: its group size is negative.
uint32_t take_flags(int64_t& spec) {
  if (spec < 0) return 0;
  const uint32_t flags = ((spec & kProgrammaticLaunch) != 0 ? CX_GEMM_PROGRAMMATIC_LAUNCH : 0) |
                         ((spec & kTransposed) != 0 ? CX_GEMM_TRANSPOSED : 0);
  spec &= ~(kProgrammaticLaunch | kTransposed);
  return flags;
}

// What a weight is, without its buffers.
cx_weight describe(cx_layout layout, int64_t spec, int64_t n, int64_t k) {
  cx_weight w{};
  w.format = static_cast<int32_t>(spec & 0xFF);
  w.layout = layout;
  w.scale_type = static_cast<cx_scale_type>(spec >> 8 & 0xF);
  w.zero_type = static_cast<cx_zero_type>(spec >> 12 & 0xF);
  w.group_size = spec >> 16;
  w.n = n;
  w.k = k;
  return w;
}

cx_weight to_weight(const char* function, cx_layout layout, const WeightArguments& a, const Place& place) {
  cx_weight w = describe(layout, a.spec, a.n, a.k);
  cx_weight_sizes sizes;  // also checks format, types, shape and group size
  check(function, cx_weight_bytes(&w, &sizes));
  const ScalarType scale = scale_scalar_type(w.scale_type);
  check_tensor(function, "codes", a.codes, ScalarType::Byte, place);
  check_tensor(function, "scales", a.scales, scale, place);
  // The C API's structs have mutable pointers because cx_pack writes through them; here they are read.
  w.codes = const_cast<void*>(a.codes.const_data_ptr());
  w.scales = const_cast<void*>(a.scales.const_data_ptr());
  w.codes_bytes = static_cast<size_t>(a.codes.numel());
  w.scales_bytes = static_cast<size_t>(a.scales.numel()) * a.scales.element_size();
  if (a.zeros.has_value()) {
    check_tensor(function, "zeros", *a.zeros, w.zero_type == CX_ZERO_INTEGER ? ScalarType::Byte : scale, place);
    w.zeros = const_cast<void*>(a.zeros->const_data_ptr());
    w.zeros_bytes = static_cast<size_t>(a.zeros->numel()) * a.zeros->element_size();
  }
  if (a.codebook.has_value()) {
    cx_format_info info;
    check(function, cx_get_format(w.format, &info));
    check_tensor(function, "codebook", *a.codebook, ScalarType::Float, place);
    check_numel(function, "codebook", *a.codebook, int64_t{1} << info.bits);
    w.codebook = static_cast<const float*>(a.codebook->const_data_ptr());
  }
  if (a.scale_data.has_value()) {
    check_tensor(function, "scale_data", *a.scale_data, ScalarType::Float, place);
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

bool is_gemm(int32_t instance) {
  cx_instance_info info;
  check("gemm", cx_get_instance(instance, &info));
  return info.is_gemm != 0;
}

// What a call gives to the C API; y and the workspace come later. Holds what the pointers point into.
struct GemmCall {
  Tensor x;
  std::optional<Tensor> bias;
  Shape y_shape;
  cx_gemm_args args{};

  GemmCall(const Tensor& x_in, const cx_weight& weight, const std::optional<Tensor>& bias_in, uint32_t flags,
           int32_t instance, const Place& place);

  bool transposed() const { return (args.flags & CX_GEMM_TRANSPOSED) != 0; }
  // Whether the dispatch may choose torch's own GEMM: on a GPU, and where the CPU has no kernels.
  bool may_be_dense() const { return args.device == CX_CUDA || transposed(); }
};

GemmCall::GemmCall(const Tensor& x_in, const cx_weight& weight, const std::optional<Tensor>& bias_in, uint32_t flags,
                   int32_t instance, const Place& place)
    : x(x_in) {
  args.flags = flags;
  // Columns of x and of y.
  const int64_t k = transposed() ? weight.n : weight.k, n = transposed() ? weight.k : weight.n;
  const char* const k_name = transposed() ? "N=" : "K=";
  const int64_t dims = x_in.dim();
  if (dims > Shape::kMaxDims) fail("gemm: x: expected at most 16 dimensions, got " + std::to_string(dims));
  if (dims < 1 || x_in.size(dims - 1) != k) {
    const std::string got = dims < 1 ? "a scalar" : k_name + std::to_string(x_in.size(dims - 1));
    fail("gemm: x has " + got + ", the weight has " + k_name + std::to_string(k));
  }
  // A matrix may have any row stride, but for rows that overlap; other strides are made contiguous.
  const bool rows = dims == 2 && x_in.stride(1) == 1 && (x_in.stride(0) >= k || x_in.stride(0) == 0);
  if (!rows && !x_in.is_contiguous()) x = torch::stable::contiguous(x_in);
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < dims; ++i) {
    y_shape.push(x.size(i));
    m *= y_shape.sizes[i];
  }
  y_shape.push(n);
  args.weight = &weight;
  args.dtype = dtype_of(x, "gemm", "x");
  if (bias_in.has_value()) {
    if (bias_in->dim() != 1 || bias_in->size(0) != n) {
      fail("gemm: bias: expected shape [" + std::string(transposed() ? "K=" : "N=") + std::to_string(n) + "], got " +
           std::to_string(bias_in->numel()) + " values in " + std::to_string(bias_in->dim()) + " dimensions");
    }
    bias = bias_in->is_contiguous() ? *bias_in : torch::stable::contiguous(*bias_in);
    check_tensor("gemm", "bias", *bias, x.scalar_type(), place);
    args.bias = bias->const_data_ptr();
  }
  args.m = m;
  args.x = x.const_data_ptr();
  args.ldx = rows ? x.stride(0) : k;
  args.ldy = n;
  args.device = place.device;
  args.stream = place.stream;
  args.instance = instance;
  args.threads = place.device == CX_CPU ? static_cast<int32_t>(torch::stable::get_num_threads()) : 1;
}

// The instance that the dispatch chooses.
int32_t select(const char* function, const GemmCall& call) {
  cx_gemm_args args = call.args;
  if (call.may_be_dense()) args.flags |= CX_GEMM_DENSE_FALLBACK;
  int32_t index = 0;
  check(function, cx_select_instance(&args, &index));
  return index;
}

// A matrix in the memory of `t`, from its first element on.
Tensor view_as_matrix(const Tensor& t, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  AtenTensorHandle handle = nullptr;
  constexpr int64_t kOffset = 0;  // added to that of `t`
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, kOffset, &handle));
  return Tensor(handle);
}

// Dequantizes into x's dtype, then torch's own GEMM into y. By its out variant, which autocast leaves alone.
void run_dense(const GemmCall& call, const Tensor& y, int32_t instance, const Place& place) {
  const cx_gemm_args& args = call.args;
  const int64_t n = args.weight->n, k = args.weight->k;
  Shape shape;
  shape.push(n);
  shape.push(k);
  Tensor dense = empty(shape, call.x.scalar_type(), place);
  check("gemm", cx_dequantize(args.weight, args.dtype, dense.mutable_data_ptr(), k, place.device, place.stream,
                              instance, args.threads));
  if (call.transposed()) dense = view_as_matrix(dense, k, n, 1, k);
  const Tensor x = view_as_matrix(call.x, args.m, dense.size(1), args.ldx, 1);
  const Tensor out = view_as_matrix(y, args.m, dense.size(0), args.ldy, 1);
  StableIValue arguments[] = {torch::stable::detail::from(x), torch::stable::detail::from(dense),
                              torch::stable::detail::from(call.bias), torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", arguments, TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(arguments[0]);  // the same as `out`; takes the reference that came back
}

Tensor run_gemm(const Tensor& x, WeightArguments weight_arguments, const std::optional<Tensor>& bias,
                int32_t instance) {
  const Place place(x);
  const uint32_t flags = take_flags(weight_arguments.spec);
  const cx_weight weight = to_weight("gemm", CX_PACKED, weight_arguments, place);
  GemmCall call(x, weight, bias, flags, instance, place);
  cx_gemm_args& args = call.args;
  Tensor y = empty(call.y_shape, call.x.scalar_type(), place);
  if (args.m == 0) return y;
  args.y = y.mutable_data_ptr();
  if (instance == -1 && call.may_be_dense()) {
    args.instance = select("gemm", call);
    if (!is_gemm(args.instance)) {
      run_dense(call, y, args.instance, place);
      return y;
    }
  }
  if (place.device == CX_CUDA) {
    check("gemm", cx_gemm(&args));  // no instance for CUDA needs a workspace
    return y;
  }
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
  return run_gemm(x, CX_WEIGHT_ARGUMENTS, bias, -1);
}

// The instance that gemm would run, as an index; of a dequantizing one where torch's GEMM follows it.
int64_t select_instance(const Tensor& x, CX_TENSOR_PARAMETERS, std::optional<Tensor> bias, CX_SPEC_PARAMETERS) {
  const Place place(x);
  const uint32_t flags = take_flags(spec);
  const cx_weight weight = to_weight("explain", CX_PACKED, CX_WEIGHT_ARGUMENTS, place);
  GemmCall call(x, weight, bias, flags, -1, place);
  call.args.y = const_cast<void*>(call.args.x);  // checked to be a pointer, not written
  return select("explain", call);
}

Tensor gemm_instance(const Tensor& x, CX_TENSOR_PARAMETERS, std::optional<Tensor> bias, CX_SPEC_PARAMETERS,
                     int64_t instance) {
  if (instance < 0 || instance >= cx_instance_count()) {
    fail("gemm: instance: expected 0.." + std::to_string(cx_instance_count() - 1) + ", got " +
         std::to_string(instance));
  }
  return run_gemm(x, CX_WEIGHT_ARGUMENTS, bias, static_cast<int32_t>(instance));
}

Tensor run_dequantize(cx_layout layout, const WeightArguments& a, int64_t dtype) {
  const Place place(a.codes);
  const cx_weight weight = to_weight("dequantize", layout, a, place);
  if (dtype < CX_FP32 || dtype > CX_BF16) fail("dequantize: dtype: expected 0, 1 or 2, got " + std::to_string(dtype));
  Shape shape;
  shape.push(a.n);
  shape.push(a.k);
  Tensor out = empty(shape, scalar_type(static_cast<cx_dtype>(dtype)), place);
  check("dequantize", cx_dequantize(&weight, static_cast<cx_dtype>(dtype), out.mutable_data_ptr(), a.k, place.device,
                                    place.stream, -1, static_cast<int32_t>(torch::stable::get_num_threads())));
  return out;
}

Tensor dequantize(CX_TENSOR_PARAMETERS, CX_SPEC_PARAMETERS, int64_t dtype) {
  return run_dequantize(CX_PACKED, CX_WEIGHT_ARGUMENTS, dtype);
}

Tensor dequantize_canonical(CX_TENSOR_PARAMETERS, CX_SPEC_PARAMETERS, int64_t dtype) {
  return run_dequantize(CX_CANONICAL, CX_WEIGHT_ARGUMENTS, dtype);
}

// pack and unpack: codes, scales and zeros (empty without zeros) in the other layout.
std::tuple<Tensor, Tensor, Tensor> convert(const char* function, cx_layout from_layout, const WeightArguments& a) {
  const Place place(a.codes);
  const cx_weight from = to_weight(function, from_layout, a, place);
  cx_weight to = from;
  to.layout = from_layout == CX_CANONICAL ? CX_PACKED : CX_CANONICAL;
  cx_weight_sizes sizes;
  check(function, cx_weight_bytes(&to, &sizes));
  const auto count = [](size_t bytes, const Tensor& like) { return static_cast<int64_t>(bytes / like.element_size()); };
  Tensor codes = empty(static_cast<int64_t>(sizes.codes_bytes), ScalarType::Byte, place);
  Tensor scales = empty(count(sizes.scales_bytes, a.scales), a.scales.scalar_type(), place);
  Tensor zeros = a.zeros.has_value() ? empty(count(sizes.zeros_bytes, *a.zeros), a.zeros->scalar_type(), place)
                                     : empty(0, ScalarType::Byte, place);
  to.codes = codes.mutable_data_ptr();
  to.scales = scales.mutable_data_ptr();
  to.zeros = a.zeros.has_value() ? zeros.mutable_data_ptr() : nullptr;
  to.codes_bytes = sizes.codes_bytes;
  to.scales_bytes = sizes.scales_bytes;
  to.zeros_bytes = sizes.zeros_bytes;
  check(function, from_layout == CX_CANONICAL ? cx_pack(&from, &to, place.device, place.stream)
                                              : cx_unpack(&from, &to, place.device, place.stream));
  return {codes, scales, zeros};
}

std::tuple<Tensor, Tensor, Tensor> pack(CX_TENSOR_PARAMETERS, CX_SPEC_PARAMETERS) {
  return convert("pack", CX_CANONICAL, CX_WEIGHT_ARGUMENTS);
}

std::tuple<Tensor, Tensor, Tensor> unpack(CX_TENSOR_PARAMETERS, CX_SPEC_PARAMETERS) {
  return convert("unpack", CX_PACKED, CX_WEIGHT_ARGUMENTS);
}

// A weight on the GPU -> codes, scales, zeros, nested_absmax, nested_offset or tensor_scale, and the status to be
// looked at (cx_quantize_status); empty tensors for what the format has not. `codebook` is a CPU tensor. `spec` as in
// WeightArguments.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> quantize(const Tensor& w_in, std::optional<Tensor> codebook,
                                                                    std::optional<Tensor> nested_map, int64_t spec) {
  constexpr const char* kFunction = "quantize";
  const Place place(w_in);
  if (w_in.dim() != 2) fail("quantize: w: expected 2 dimensions, got " + std::to_string(w_in.dim()));
  cx_weight weight = describe(CX_CANONICAL, spec, w_in.size(0), w_in.size(1));
  cx_weight_sizes sizes;
  check(kFunction, cx_weight_bytes(&weight, &sizes));
  cx_format_info info;
  check(kFunction, cx_get_format(weight.format, &info));
  const ScalarType scale = scale_scalar_type(weight.scale_type);
  const ScalarType zero = weight.zero_type == CX_ZERO_FLOAT ? scale : ScalarType::Byte;
  const auto bytes_of = [](ScalarType type) {
    return type == ScalarType::Byte ? 1 : type == ScalarType::Float ? 4 : 2;
  };
  const auto buffer = [&](size_t bytes, ScalarType type) {
    return empty(static_cast<int64_t>(bytes) / bytes_of(type), type, place);
  };
  const bool nested = weight.scale_type == CX_SCALE_NESTED;
  Tensor codes = buffer(sizes.codes_bytes, ScalarType::Byte);
  Tensor scales = buffer(sizes.scales_bytes, scale);
  Tensor zeros = buffer(sizes.zeros_bytes, zero);
  Tensor absmax = empty(sizes.nested_absmax_count, ScalarType::Float, place);
  Tensor scalar = empty(nested || info.tensor_scale ? 1 : 0, ScalarType::Float, place);
  Tensor status = empty(int64_t{sizeof(cx_quantize_status)} / 4, ScalarType::Int, place);
  weight.codes = codes.mutable_data_ptr();
  weight.scales = scales.mutable_data_ptr();
  weight.zeros = weight.zero_type == CX_ZERO_NONE ? nullptr : zeros.mutable_data_ptr();
  weight.codes_bytes = sizes.codes_bytes;
  weight.scales_bytes = sizes.scales_bytes;
  weight.zeros_bytes = sizes.zeros_bytes;
  if (nested) {
    if (!nested_map.has_value()) fail("quantize: nested_map: expected a tensor, got none");
    check_tensor(kFunction, "nested_map", *nested_map, ScalarType::Float, place);
    check_numel(kFunction, "nested_map", *nested_map, kNestedMapSize);
    weight.nested_map = static_cast<const float*>(nested_map->const_data_ptr());
    weight.nested_absmax = static_cast<const float*>(absmax.const_data_ptr());
    weight.nested_absmax_count = sizes.nested_absmax_count;
    weight.nested_offset = static_cast<const float*>(scalar.const_data_ptr());
  } else if (info.tensor_scale) {
    weight.tensor_scale = static_cast<const float*>(scalar.const_data_ptr());
  }
  if (codebook.has_value()) {
    check_tensor(kFunction, "codebook", *codebook, ScalarType::Float, Place());
    check_numel(kFunction, "codebook", *codebook, int64_t{1} << info.bits);
    weight.codebook = static_cast<const float*>(codebook->const_data_ptr());
  }
  // Rows may lie at any distance; blocks that cross row ends need them one behind the other.
  const bool flat = info.flat_blocks && weight.k % weight.group_size != 0;
  const bool rows = (w_in.stride(1) == 1 || weight.k == 1) && !flat;
  const Tensor w = rows || w_in.is_contiguous() ? w_in : torch::stable::contiguous(w_in);
  cx_quantize_args args{};
  args.w = w.const_data_ptr();
  args.dtype = dtype_of(w, kFunction, "w");
  args.ldw = rows ? w.stride(0) : weight.k;
  args.weight = &weight;
  args.status = static_cast<cx_quantize_status*>(status.mutable_data_ptr());
  args.device = place.device;
  args.stream = place.stream;
  check(kFunction, cx_quantize_workspace(&weight, &args.workspace_bytes));
  std::optional<Tensor> workspace;
  if (args.workspace_bytes > 0) {
    workspace = empty(static_cast<int64_t>(args.workspace_bytes), ScalarType::Byte, place);
    args.workspace = workspace->mutable_data_ptr();
  }
  check(kFunction, cx_quantize(&args));
  return {codes, scales, zeros, absmax, scalar, status};
}

}  // namespace

STABLE_TORCH_LIBRARY(pyquant, m) {
  m.def("gemm(Tensor x, " CX_TENSOR_SCHEMA "Tensor? bias, " CX_SPEC_SCHEMA ") -> Tensor");
  // A kernel of the caller's choice, for tests and profiling. Not an argument of gemm, where it would cost every call.
  m.def("gemm_instance(Tensor x, " CX_TENSOR_SCHEMA "Tensor? bias, " CX_SPEC_SCHEMA ", int instance) -> Tensor");
  m.def("select_instance(Tensor x, " CX_TENSOR_SCHEMA "Tensor? bias, " CX_SPEC_SCHEMA ") -> int");
  m.def("dequantize(" CX_TENSOR_SCHEMA CX_SPEC_SCHEMA ", int dtype) -> Tensor");
  m.def("dequantize_canonical(" CX_TENSOR_SCHEMA CX_SPEC_SCHEMA ", int dtype) -> Tensor");
  m.def(
      "quantize(Tensor w, Tensor? codebook, Tensor? nested_map, int spec) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("read_floor(Tensor bytes, Tensor(a!) scratch) -> ()");
  m.def("pack(" CX_TENSOR_SCHEMA CX_SPEC_SCHEMA ") -> (Tensor, Tensor, Tensor)");
  m.def("unpack(" CX_TENSOR_SCHEMA CX_SPEC_SCHEMA ") -> (Tensor, Tensor, Tensor)");
}

// The benchmark's floor: a kernel that only reads. `scratch` gets what keeps the reads from being left out.
void read_floor(const Tensor& bytes, Tensor scratch) {
  const Place place(bytes);
  check_tensor("read_floor", "bytes", bytes, ScalarType::Byte, place);
  check("read_floor", cx_read_floor(bytes.const_data_ptr(), static_cast<size_t>(bytes.numel()),
                                    scratch.mutable_data_ptr(), place.device, place.stream));
}

#define CX_IMPLEMENTATIONS(m)                                       \
  m.impl("gemm", TORCH_BOX(&gemm));                                 \
  m.impl("gemm_instance", TORCH_BOX(&gemm_instance));               \
  m.impl("select_instance", TORCH_BOX(&select_instance));           \
  m.impl("dequantize", TORCH_BOX(&dequantize));                     \
  m.impl("dequantize_canonical", TORCH_BOX(&dequantize_canonical)); \
  m.impl("quantize", TORCH_BOX(&quantize));                         \
  m.impl("pack", TORCH_BOX(&pack));                                 \
  m.impl("unpack", TORCH_BOX(&unpack))

STABLE_TORCH_LIBRARY_IMPL(pyquant, CPU, m) { CX_IMPLEMENTATIONS(m); }
STABLE_TORCH_LIBRARY_IMPL(pyquant, CUDA, m) {
  CX_IMPLEMENTATIONS(m);
  m.impl("read_floor", TORCH_BOX(&read_floor));
}
