#include "checkpoint.hpp"

#include <cstring>
#include <string_view>

#include "number_formats.hpp"

using safetensors::Contents;
using safetensors::FileError;
using safetensors::Tensor;

namespace {

constexpr char kSpecSuffix[] = ".weight.quant_spec";
constexpr char kCodesSuffix[] = ".weight.codes";
constexpr int64_t kLayoutVersion = 1;
constexpr int64_t kMaxExtent = int64_t{1} << 31;  // keeps N, K and K * bits far from overflow

// The dtype of stored scales, by cx_scale_type.
constexpr const char* kScaleDtypes[] = {"F32", "F16", "BF16", "U8", "U8", "U8", "U8"};

bool ends_with(std::string_view text, std::string_view suffix) {
  return text.size() >= suffix.size() && text.substr(text.size() - suffix.size()) == suffix;
}

const Tensor* find(const Contents& contents, const std::string& name) {
  const auto it = contents.tensors.find(name);
  return it == contents.tensors.end() ? nullptr : &it->second;
}

const Tensor& expect(const Contents& contents, const std::string& name, const std::string& dtype,
                     const std::vector<int64_t>& shape) {
  const std::string expected = safetensors::describe({dtype, shape, nullptr, 0});
  const Tensor* tensor = find(contents, name);
  if (!tensor) throw FileError("tensor '" + name + "': expected " + expected + ", got none");
  if (tensor->dtype != dtype || tensor->shape != shape) {
    throw FileError("tensor '" + name + "': expected " + expected + ", got " + safetensors::describe(*tensor));
  }
  return *tensor;
}

int64_t read_int64(const Tensor& tensor, size_t index) {
  int64_t value;
  std::memcpy(&value, tensor.data + index * sizeof value, sizeof value);
  return value;
}

int64_t expect_range(const char* field, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return value;
  throw FileError(std::string("quant_spec: ") + field + ": expected " + std::to_string(low) + ".." +
                  std::to_string(high) + ", got " + std::to_string(value));
}

std::vector<float> read_bias(const Contents& contents, const std::string& name, int64_t n) {
  const Tensor* tensor = find(contents, name);
  if (!tensor) return {};
  const bool is_float = tensor->dtype == "F32" || tensor->dtype == "F16" || tensor->dtype == "BF16";
  expect(contents, name, is_float ? tensor->dtype : "F32, F16 or BF16", {n});
  std::vector<float> bias(static_cast<size_t>(n));
  for (size_t i = 0; i < bias.size(); ++i) {
    if (tensor->dtype == "F32") {
      std::memcpy(&bias[i], tensor->data + 4 * i, 4);
    } else {
      uint16_t bits;
      std::memcpy(&bits, tensor->data + 2 * i, 2);
      bias[i] = tensor->dtype == "F16" ? float_from_fp16(bits) : float_from_bf16(bits);
    }
  }
  return bias;
}

}  // namespace

std::vector<std::string> quantized_layers(const safetensors::MappedFile& file) {
  std::vector<std::string> names;
  for (const auto& [name, tensor] : file.contents().tensors) {
    if (ends_with(name, kSpecSuffix)) {
      names.push_back(name.substr(0, name.size() - std::strlen(kSpecSuffix)));
    } else if (ends_with(name, kCodesSuffix)) {
      const std::string layer = name.substr(0, name.size() - std::strlen(kCodesSuffix));
      if (!find(file.contents(), layer + kSpecSuffix)) {
        throw FileError(file.path() + ": tensor '" + layer + kSpecSuffix + "': expected beside '" + name +
                        "', got none");
      }
    }
  }
  if (names.empty()) throw FileError(file.path() + ": expected a quantized layer (*" + kSpecSuffix + "), got none");
  return names;
}

CanonicalLayer::CanonicalLayer(const safetensors::MappedFile& file, const std::string& name) {
  const std::string where = file.path() + ": layer '" + name + "': ";
  try {
    load(file.contents(), name);
  } catch (const FileError& error) {
    throw FileError(where + error.what());
  } catch (const cutlass_ext::Error& error) {
    throw cutlass_ext::Error(error.status(), where + error.what());
  }
}

void* CanonicalLayer::copy(const Tensor& tensor) {
  cutlass_ext::AlignedBuffer& buffer = copies_.emplace_back(cutlass_ext::make_buffer(tensor.bytes));
  std::memcpy(buffer.data(), tensor.data, tensor.bytes);
  return buffer.data();
}

void CanonicalLayer::load(const Contents& contents, const std::string& name) {
  const Tensor& spec = expect(contents, name + kSpecSuffix, "I64", {7});
  expect_range("layout version", read_int64(spec, 0), kLayoutVersion, kLayoutVersion);
  weight_.layout = CX_CANONICAL;
  weight_.format = static_cast<int32_t>(expect_range("format", read_int64(spec, 1), 0, cx_format_count() - 1));
  weight_.scale_type =
      static_cast<cx_scale_type>(expect_range("scale type", read_int64(spec, 2), CX_SCALE_FP32, CX_SCALE_NESTED));
  weight_.zero_type =
      static_cast<cx_zero_type>(expect_range("zero type", read_int64(spec, 3), CX_ZERO_NONE, CX_ZERO_FLOAT));
  weight_.group_size = expect_range("group_size", read_int64(spec, 4), 1, kMaxExtent);
  weight_.n = expect_range("N", read_int64(spec, 5), 1, kMaxExtent);
  weight_.k = expect_range("K", read_int64(spec, 6), 1, kMaxExtent);

  cx_format_info format;
  cutlass_ext::check(cx_get_format(weight_.format, &format));
  cx_weight_sizes sizes;
  cutlass_ext::check(cx_weight_bytes(&weight_, &sizes));  // also checks that the fields fit each other

  // Every part that the weight needs has to be there, and no other.
  const auto part = [&](const char* suffix, bool needed, const char* dtype,
                        const std::vector<int64_t>& shape) -> const Tensor* {
    const std::string tensor = name + ".weight." + suffix;
    if (needed) return &expect(contents, tensor, dtype, shape);
    if (const Tensor* extra = find(contents, tensor)) {
      throw FileError("tensor '" + tensor + "': expected none, got " + safetensors::describe(*extra));
    }
    return nullptr;
  };
  const auto floats = [&](const char* suffix, bool needed, const std::vector<int64_t>& shape) {
    const Tensor* tensor = part(suffix, needed, "F32", shape);
    return tensor ? static_cast<const float*>(copy(*tensor)) : nullptr;
  };

  const char* scale_dtype = kScaleDtypes[weight_.scale_type];
  const auto scale_count = static_cast<int64_t>(sizes.scales_bytes / safetensors::dtype_bytes(scale_dtype));
  const bool flat = format.flat_blocks && weight_.k % weight_.group_size != 0;
  const std::vector<int64_t> scale_shape =
      flat ? std::vector<int64_t>{scale_count} : std::vector<int64_t>{weight_.n, scale_count / weight_.n};

  const Tensor* codes = part("codes", true, "U8", {weight_.n, static_cast<int64_t>(sizes.codes_bytes) / weight_.n});
  const Tensor* scales = part("scales", true, scale_dtype, scale_shape);
  const Tensor* zeros = part("zeros", weight_.zero_type != CX_ZERO_NONE,
                             weight_.zero_type == CX_ZERO_INTEGER ? "U8" : scale_dtype, scale_shape);
  weight_.codes = const_cast<uint8_t*>(codes->data);  // a canonical weight is only read
  weight_.codes_bytes = codes->bytes;
  weight_.scales = copy(*scales);
  weight_.scales_bytes = scales->bytes;
  weight_.zeros = zeros ? copy(*zeros) : nullptr;
  weight_.zeros_bytes = zeros ? zeros->bytes : 0;

  const bool nested = weight_.scale_type == CX_SCALE_NESTED;
  // A codebook may stand in place of the format's own.
  const bool has_codebook =
      format.is_codebook && (!format.codebook || contents.tensors.count(name + ".weight.codebook") != 0);
  weight_.codebook = floats("codebook", has_codebook, {int64_t{1} << format.bits});
  weight_.nested_map = floats("nested_map", nested, {256});
  weight_.nested_absmax = floats("nested_absmax", nested, {sizes.nested_absmax_count});
  weight_.nested_absmax_count = sizes.nested_absmax_count;
  weight_.nested_offset = floats("nested_offset", nested, {});
  weight_.tensor_scale = floats("tensor_scale", format.tensor_scale, {});
  bias_ = read_bias(contents, name + ".bias", weight_.n);
  // Act-order: y would need a gather of x's columns, which this server does not do.
  if (const Tensor* order = find(contents, name + ".permutation")) {
    throw FileError("tensor '" + name + ".permutation': expected none (no act-order), got " +
                    safetensors::describe(*order));
  }
}
