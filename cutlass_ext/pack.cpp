#include "cutlass_ext/pack.hpp"

#include <cinttypes>
#include <cstring>

#include "cutlass_ext/check.hpp"
#include "cutlass_ext/status.hpp"
#include "kernels/cpu/pack.hpp"
#ifdef CUTLASS_EXT_CUDA
#include "kernels/cuda/pack.hpp"
#endif

namespace cutlass_ext {
namespace {

using layout::CodeOrder;

template <int kBits, CodeOrder kOrder>
void convert_codes(const Weight& from, uint8_t* to, bool pack) {
  const cpu::CodeShape shape{from.n, from.k, from.bias};
  if (pack) {
    cpu::pack_codes<kBits, kOrder>(from.codes, to, shape);
  } else {
    cpu::unpack_codes<kBits, kOrder>(from.codes, to, shape);
  }
}

template <int kBits>
void convert_codes(const Weight& from, uint8_t* to, bool pack) {
  if (from.order == CodeOrder::kPairs) {
    convert_codes<kBits, CodeOrder::kPairs>(from, to, pack);
  } else {
    convert_codes<kBits, CodeOrder::kHalves>(from, to, pack);
  }
}

void convert_codes(const Weight& from, uint8_t* to, bool pack) {
  switch (from.bits) {
    case 2:
      return convert_codes<2>(from, to, pack);
    case 3:
      return convert_codes<3>(from, to, pack);
    case 4:
      return convert_codes<4>(from, to, pack);
    case 5:
      return convert_codes<5>(from, to, pack);
    case 8:
      return convert_codes<8>(from, to, pack);
  }
}

template <class T>
void convert_groups(const Weight& shape, const void* from, void* to, bool pack) {
  const cpu::GroupShape groups{shape.n, shape.k, shape.group_size};
  if (pack) {
    cpu::pack_groups(static_cast<const T*>(from), static_cast<T*>(to), groups);
  } else {
    cpu::unpack_groups(static_cast<const T*>(from), static_cast<T*>(to), groups);
  }
}

// Scales or zeros of `size` bytes each.
void convert_groups(const Weight& shape, const void* from, void* to, size_t bytes, int size, bool pack) {
  if (shape.flat_scales) {
    std::memcpy(to, from, bytes);
  } else if (size == 1) {
    convert_groups<uint8_t>(shape, from, to, pack);
  } else if (size == 2) {
    convert_groups<uint16_t>(shape, from, to, pack);
  } else {
    convert_groups<uint32_t>(shape, from, to, pack);
  }
}

}  // namespace

cx_status convert_layout(const char* function, const cx_weight* from, cx_layout from_layout, cx_weight* to,
                         cx_device device_in, [[maybe_unused]] void* stream) {
  Device device;
  CX_TRY(check_device(function, device_in, &device));
  Weight source;
  CX_TRY(check_weight(function, from, from_layout, &source));
  if (to == nullptr) return fail(CX_INVALID_ARGUMENT, function, "to: expected a pointer, got NULL");
  if (to->format != from->format || to->scale_type != from->scale_type || to->zero_type != from->zero_type ||
      to->n != from->n || to->k != from->k || to->group_size != from->group_size) {
    return fail(CX_INVALID_ARGUMENT, function, "to: expected the format, types, shape and group size of `from`");
  }
  // Codebook and nested parts are not converted: `to` may leave them out.
  cx_weight target = *to;
  target.codebook = from->codebook;
  target.nested_map = from->nested_map;
  target.nested_absmax = from->nested_absmax;
  target.nested_absmax_count = from->nested_absmax_count;
  target.nested_offset = from->nested_offset;
  target.tensor_scale = from->tensor_scale;
  Weight checked;
  CX_TRY(check_weight(function, &target, from_layout == CX_CANONICAL ? CX_PACKED : CX_CANONICAL, &checked));
  const bool pack = from_layout == CX_CANONICAL;
#ifdef CUTLASS_EXT_CUDA
  if (device == Device::kCuda) {
    const char* error = cuda::convert_layout(source, pack, to->codes, to->scales, to->zeros, stream);
    return error == nullptr ? CX_OK : fail(CX_INTERNAL, function, "CUDA reports: %s", error);
  }
#endif
  convert_codes(source, static_cast<uint8_t*>(to->codes), pack);
  convert_groups(source, from->scales, to->scales, to->scales_bytes, size_of(source.scale_type), pack);
  if (source.zeros != nullptr) {
    convert_groups(source, from->zeros, to->zeros, to->zeros_bytes, zero_size(source.zero_type, source.scale_type),
                   pack);
  }
  return CX_OK;
}

}  // namespace cutlass_ext
