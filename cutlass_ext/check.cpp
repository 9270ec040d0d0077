#include "cutlass_ext/check.hpp"

#include <omp.h>

#include <cinttypes>
#include <string>

#include "cutlass_ext/status.hpp"
#include "kernels/layout.hpp"
#ifdef CUTLASS_EXT_CUDA
#include "kernels/cuda/device.hpp"
#endif

namespace cutlass_ext {
namespace {

// N and K below 2^31, so that N * K and all sizes fit in 63 bits.
constexpr int64_t kMaxExtent = INT32_MAX;

std::string group_rule(const Format& format) {
  if (format.group_sizes[0] == 0) return "a power of two >= 16, or K";
  std::string rule;
  for (const int* size = format.group_sizes; *size != 0; ++size) {
    rule += (rule.empty() ? "" : " or ") + std::to_string(*size);
  }
  return rule;
}

bool allows_group(const Format& format, int64_t group_size, int64_t k) {
  if (format.group_sizes[0] == 0) {
    return group_size == k || (group_size >= 16 && (group_size & (group_size - 1)) == 0);
  }
  for (const int* size = format.group_sizes; *size != 0; ++size) {
    if (*size == group_size) return true;
  }
  return false;
}

std::string allowed_names(uint32_t mask, int count, const char* (*name)(int)) {
  std::string names;
  for (int i = 0; i < count; ++i) {
    if ((mask >> i & 1u) != 0) names += (names.empty() ? "" : " or ") + std::string(name(i));
  }
  return names;
}

// A pointer that a weight must have, or must not have.
cx_status check_pointer(const char* function, const char* argument, const void* pointer, bool expected) {
  if ((pointer != nullptr) == expected) return CX_OK;
  return fail(CX_INVALID_ARGUMENT, function, "weight.%s: expected %s, got %s", argument,
              expected ? "a pointer" : "NULL for this format and these types", expected ? "NULL" : "a pointer");
}

cx_status check_bytes(const char* function, const char* argument, size_t got, size_t expected) {
  if (got == expected) return CX_OK;
  return fail(CX_INVALID_ARGUMENT, function, "weight.%s: expected %zu, got %zu", argument, expected, got);
}

}  // namespace

const char* name_of(cx_scale_type type) {
  static const char* const kNames[] = {"fp32", "fp16", "bf16", "e4m4", "e4m3", "e8m0", "nested"};
  return kNames[type];
}

const char* name_of(cx_zero_type type) {
  static const char* const kNames[] = {"none", "integer", "float"};
  return kNames[type];
}

cx_weight_sizes weight_sizes(const cx_weight& w, const Format& format) {
  const auto scale_type = static_cast<ScaleType>(w.scale_type);
  const bool flat = layout::scales_are_flat(format.flat_blocks, w.k, w.group_size);
  const int64_t blocks = flat ? layout::ceil_div(w.n * w.k, w.group_size) : w.n * layout::ceil_div(w.k, w.group_size);
  const bool packed = w.layout == CX_PACKED;
  const int64_t scales = packed && !flat ? layout::packed_scale_count(w.n, w.k, w.group_size) : blocks;
  const int64_t codes =
      packed ? layout::packed_code_bytes(w.n, w.k, format.bits) : w.n * layout::ceil_div(w.k * format.bits, 8);
  cx_weight_sizes sizes;
  sizes.codes_bytes = static_cast<size_t>(codes);
  sizes.scales_bytes = static_cast<size_t>(scales * size_of(scale_type));
  sizes.zeros_bytes = static_cast<size_t>(scales * zero_size(static_cast<ZeroType>(w.zero_type), scale_type));
  sizes.nested_absmax_count = scale_type == ScaleType::kNested ? layout::ceil_div(blocks, kNestedBlock) : 0;
  return sizes;
}

cx_status check_spec(const char* function, const cx_weight* w, const Format** out) {
  if (w == nullptr) return fail(CX_INVALID_ARGUMENT, function, "weight: expected a pointer, got NULL");
  if (w->format < 0 || w->format >= kFormatCount) {
    return fail(CX_INVALID_ARGUMENT, function, "weight.format: expected 0..%d, got %" PRId32, kFormatCount - 1,
                w->format);
  }
  const Format& format = kFormats[w->format];
  if (w->layout != CX_CANONICAL && w->layout != CX_PACKED) {
    return fail(CX_INVALID_ARGUMENT, function, "weight.layout: expected CX_CANONICAL or CX_PACKED, got %d", w->layout);
  }
  constexpr int kScaleTypes = CX_SCALE_NESTED + 1;
  constexpr int kZeroTypes = CX_ZERO_FLOAT + 1;
  const auto scale_type = static_cast<uint32_t>(w->scale_type);
  if (scale_type >= kScaleTypes || (format.scale_types >> scale_type & 1u) == 0) {
    const auto allowed =
        allowed_names(format.scale_types, kScaleTypes, [](int i) { return name_of(static_cast<cx_scale_type>(i)); });
    return fail(CX_INVALID_ARGUMENT, function, "weight.scale_type: %s expects %s, got %s", format.name, allowed.c_str(),
                scale_type < kScaleTypes ? name_of(w->scale_type) : std::to_string(w->scale_type).c_str());
  }
  const auto zero_type = static_cast<uint32_t>(w->zero_type);
  if (zero_type >= kZeroTypes || (format.zero_types >> zero_type & 1u) == 0) {
    const auto allowed =
        allowed_names(format.zero_types, kZeroTypes, [](int i) { return name_of(static_cast<cx_zero_type>(i)); });
    return fail(CX_INVALID_ARGUMENT, function, "weight.zero_type: %s expects %s, got %s", format.name, allowed.c_str(),
                zero_type < kZeroTypes ? name_of(w->zero_type) : std::to_string(w->zero_type).c_str());
  }
  if (w->n < 1 || w->n > kMaxExtent || w->k < 1 || w->k > kMaxExtent) {
    return fail(CX_INVALID_ARGUMENT, function,
                "weight: expected N and K in 1..%" PRId64 ", got N=%" PRId64 ", K=%" PRId64, kMaxExtent, w->n, w->k);
  }
  if (!allows_group(format, w->group_size, w->k)) {
    return fail(CX_INVALID_ARGUMENT, function, "weight.group_size: %s expects %s, got %" PRId64 " (K=%" PRId64 ")",
                format.name, group_rule(format).c_str(), w->group_size, w->k);
  }
  *out = &format;
  return CX_OK;
}

cx_status check_weight(const char* function, const cx_weight* w, cx_layout expected, Weight* out) {
  const Format* format = nullptr;
  CX_TRY(check_spec(function, w, &format));
  if (w->layout != expected) {
    return fail(CX_INVALID_ARGUMENT, function, "weight.layout: expected %s, got %s",
                expected == CX_PACKED ? "packed" : "canonical", expected == CX_PACKED ? "canonical" : "packed");
  }
  const bool nested = w->scale_type == CX_SCALE_NESTED;
  CX_TRY(check_pointer(function, "codes", w->codes, true));
  CX_TRY(check_pointer(function, "scales", w->scales, true));
  CX_TRY(check_pointer(function, "zeros", w->zeros, w->zero_type != CX_ZERO_NONE));
  // A codebook may stand in place of the format's own.
  const bool needs_codebook = format->is_codebook() && format->codebook == nullptr;
  CX_TRY(check_pointer(function, "codebook", w->codebook,
                       needs_codebook || (format->is_codebook() && w->codebook != nullptr)));
  CX_TRY(check_pointer(function, "nested_map", w->nested_map, nested));
  CX_TRY(check_pointer(function, "nested_absmax", w->nested_absmax, nested));
  CX_TRY(check_pointer(function, "nested_offset", w->nested_offset, nested));
  CX_TRY(check_pointer(function, "tensor_scale", w->tensor_scale, format->tensor_scale));
  const cx_weight_sizes sizes = weight_sizes(*w, *format);
  CX_TRY(check_bytes(function, "codes_bytes", w->codes_bytes, sizes.codes_bytes));
  CX_TRY(check_bytes(function, "scales_bytes", w->scales_bytes, sizes.scales_bytes));
  CX_TRY(check_bytes(function, "zeros_bytes", w->zeros_bytes, sizes.zeros_bytes));
  CX_TRY(check_bytes(function, "nested_absmax_count", static_cast<size_t>(w->nested_absmax_count),
                     static_cast<size_t>(sizes.nested_absmax_count)));
  out->packed = expected == CX_PACKED;
  out->n = w->n;
  out->k = w->k;
  out->group_size = w->group_size;
  out->bits = format->bits;
  out->order = format->order();
  out->scale_type = static_cast<ScaleType>(w->scale_type);
  out->zero_type = static_cast<ZeroType>(w->zero_type);
  out->flat_scales = layout::scales_are_flat(format->flat_blocks, w->k, w->group_size);
  out->is_codebook = format->is_codebook();
  out->bias = format->bias();
  out->codebook = w->codebook != nullptr ? w->codebook : format->codebook;
  out->codebook_on_device = w->codebook != nullptr;
  out->codes = static_cast<const uint8_t*>(w->codes);
  out->scales = w->scales;
  out->zeros = w->zeros;
  out->nested_map = w->nested_map;
  out->nested_absmax = w->nested_absmax;
  out->nested_offset = w->nested_offset;
  out->tensor_scale = w->tensor_scale;
  return CX_OK;
}

cx_status check_device(const char* function, cx_device device, Device* out) {
  if (device != CX_CPU && device != CX_CUDA) {
    return fail(CX_INVALID_ARGUMENT, function, "device: expected CX_CPU or CX_CUDA, got %d", device);
  }
  *out = device == CX_CPU ? Device::kCpu : Device::kCuda;
#ifdef CUTLASS_EXT_CUDA
  if (*out == Device::kCuda) {
    if (const char* why = cuda::device_error()) return fail(CX_NOT_SUPPORTED, function, "device: %s", why);
  }
#else
  if (*out == Device::kCuda) {
    return fail(CX_NOT_SUPPORTED, function, "device: this build has CPU kernels only, got CX_CUDA");
  }
#endif
  return CX_OK;
}

cx_status check_dtype(const char* function, cx_dtype dtype) {
  if (static_cast<uint32_t>(dtype) <= CX_BF16) return CX_OK;
  return fail(CX_INVALID_ARGUMENT, function, "dtype: expected CX_FP32, CX_FP16 or CX_BF16, got %d", dtype);
}

cx_status resolve_threads(const char* function, int32_t threads, int* out) {
  if (threads < 0) return fail(CX_INVALID_ARGUMENT, function, "threads: expected >= 0, got %" PRId32, threads);
  *out = threads > 0 ? threads : omp_get_max_threads();
  return CX_OK;
}

cx_status check_gemm(const char* function, const cx_gemm_args* args, GemmProblem* out) {
  if (args == nullptr) return fail(CX_INVALID_ARGUMENT, function, "args: expected a pointer, got NULL");
  CX_TRY(check_device(function, args->device, &out->device));
  CX_TRY(check_weight(function, args->weight, CX_PACKED, &out->weight));
  CX_TRY(check_dtype(function, args->dtype));
  if (args->m < 0 || args->m > kMaxExtent) {
    return fail(CX_INVALID_ARGUMENT, function, "m: expected 0..%" PRId64 ", got %" PRId64, kMaxExtent, args->m);
  }
  constexpr uint32_t kFlags = CX_GEMM_PROGRAMMATIC_LAUNCH | CX_GEMM_DENSE_FALLBACK | CX_GEMM_TRANSPOSED;
  if ((args->flags & ~kFlags) != 0) {
    return fail(CX_INVALID_ARGUMENT, function, "flags: expected CX_GEMM_ values, got 0x%" PRIx32, args->flags);
  }
  out->transposed = (args->flags & CX_GEMM_TRANSPOSED) != 0;
  const Weight& w = out->weight;
  const int64_t x_columns = out->transposed ? w.n : w.k, y_columns = out->transposed ? w.k : w.n;
  const char x_letter = out->transposed ? 'N' : 'K', y_letter = out->transposed ? 'K' : 'N';
  if (args->m > 0 && (args->x == nullptr || args->y == nullptr)) {
    return fail(CX_INVALID_ARGUMENT, function, "%s: expected a pointer, got NULL", args->x == nullptr ? "x" : "y");
  }
  if (args->m > 1 && args->ldx < x_columns && args->ldx != 0) {
    return fail(CX_INVALID_ARGUMENT, function,
                "ldx: expected at least %c=%" PRId64 ", or 0 for one row repeated, got %" PRId64, x_letter, x_columns,
                args->ldx);
  }
  if (args->m > 1 && args->ldy < y_columns) {
    return fail(CX_INVALID_ARGUMENT, function, "ldy: expected at least %c=%" PRId64 ", got %" PRId64, y_letter,
                y_columns, args->ldy);
  }
  CX_TRY(resolve_threads(function, args->threads, &out->threads));
  out->dtype = static_cast<DType>(args->dtype);
  out->m = args->m;
  out->x = args->x;
  out->ldx = args->ldx;
  out->y = args->y;
  out->ldy = args->ldy;
  out->bias = args->bias;
  out->workspace = args->workspace;
  out->stream = args->stream;
  out->programmatic_launch = (args->flags & CX_GEMM_PROGRAMMATIC_LAUNCH) != 0;
  return CX_OK;
}

}  // namespace cutlass_ext
