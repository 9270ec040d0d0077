// C++17 wrapper of the C API: failures throw, packed weights and workspaces own their memory, matrices carry their
// shape. Header-only. What a function requires of its arguments is said in cutlass_ext.h.
//
//   cutlass_ext::PackedWeight weight(canonical);  // once
//   cutlass_ext::Workspace workspace;             // one per thread
//   cutlass_ext::gemm<float>(weight, {x, m, k}, {y, m, n}, bias, workspace);
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cutlass_ext/cutlass_ext.h"

namespace cutlass_ext {

class Error : public std::runtime_error {
 public:
  Error(cx_status status, const std::string& message) : std::runtime_error(message), status_(status) {}
  cx_status status() const noexcept { return status_; }

 private:
  cx_status status_;
};

// Throws the calling thread's last message if a call of the C API failed.
inline void check(cx_status status) {
  if (status != CX_OK) throw Error(status, cx_last_error());
}

// major * 10000 + minor * 100 + patch of the library that runs; CX_VERSION_* are those of this header.
inline int32_t version() { return cx_version(); }

// Throws if the library found at run time cannot serve the header of compile time.
inline void check_version() {
  constexpr int32_t kHeader = CX_VERSION_MAJOR * 10000 + CX_VERSION_MINOR * 100;
  const int32_t v = version();
  const bool compatible =
      CX_VERSION_MAJOR > 0 ? v / 10000 == CX_VERSION_MAJOR && v >= kHeader : v / 100 == kHeader / 100;
  if (compatible) return;
  throw Error(CX_NOT_SUPPORTED, "check_version: library: expected one compatible with " + std::to_string(kHeader) +
                                    ", got " + std::to_string(v));
}

// The weight formats; the index is the format's id.
inline std::vector<cx_format_info> formats() {
  std::vector<cx_format_info> rows(static_cast<size_t>(cx_format_count()));
  for (size_t id = 0; id < rows.size(); ++id) check(cx_get_format(static_cast<int32_t>(id), &rows[id]));
  return rows;
}

// The kernel instances of this build; the index is what Options::instance takes.
inline std::vector<cx_instance_info> instances() {
  std::vector<cx_instance_info> rows(static_cast<size_t>(cx_instance_count()));
  for (size_t i = 0; i < rows.size(); ++i) check(cx_get_instance(static_cast<int32_t>(i), &rows[i]));
  return rows;
}

// Dispatch tables: cx_load_table. No path: back to the tables of the build.
inline void load_table(const std::string& path) { check(cx_load_table(path.c_str())); }
inline void load_table() { check(cx_load_table(nullptr)); }

// A row-major matrix of somebody else; `ld` counts elements between rows.
template <typename T>
struct MatrixView {
  T* data;
  int64_t rows, cols, ld;

  MatrixView(T* data, int64_t rows, int64_t cols) : MatrixView(data, rows, cols, cols) {}
  MatrixView(T* data, int64_t rows, int64_t cols, int64_t ld) : data(data), rows(rows), cols(cols), ld(ld) {}
  operator MatrixView<const T>() const { return {data, rows, cols, ld}; }
};

// Element type of a matrix: float, or any 2-byte type (uint16_t, __half, ...) with the dtype said in the options.
struct Options {
  cx_dtype dtype = CX_FP32;
  cx_device device = CX_CPU;
  void* stream = nullptr;  // cudaStream_t; ignored on the CPU
  int32_t instance = -1;   // -1: the dispatch chooses
  int32_t threads = 0;     // CPU threads; 0: as many as OpenMP gives
  uint32_t flags = 0;      // CX_GEMM_...
};

// Host memory at the 64-byte boundary that cx_gemm asks of a workspace.
struct alignas(64) CacheLine {
  unsigned char bytes[64];
};
using AlignedBuffer = std::vector<CacheLine>;

inline AlignedBuffer make_buffer(size_t bytes) { return AlignedBuffer((bytes + 63) / 64); }

// Scratch memory of CPU calls. It grows to the largest call it has seen; after that gemm does not allocate.
// One thread at a time.
class Workspace {
 public:
  void* reserve(size_t bytes) {
    if (bytes > 64 * buffer_.size()) buffer_ = make_buffer(bytes);
    return buffer_.data();
  }

 private:
  AlignedBuffer buffer_;
};

// A packed weight in host memory. It owns everything that its cx_weight points to, so the canonical weight may go
// away. Several threads may use it at once. (For weights in GPU memory, call cx_pack with buffers of that memory.)
class PackedWeight {
 public:
  explicit PackedWeight(const cx_weight& canonical) : view_(canonical) {
    cx_format_info format;
    check(cx_get_format(canonical.format, &format));
    view_.layout = CX_PACKED;
    cx_weight_sizes sizes;
    check(cx_weight_bytes(&view_, &sizes));

    view_.codes = allocate(view_.codes_bytes = sizes.codes_bytes, codes_);
    view_.scales = allocate(view_.scales_bytes = sizes.scales_bytes, scales_);
    view_.zeros = allocate(view_.zeros_bytes = sizes.zeros_bytes, zeros_);
    check(cx_pack(&canonical, &view_, CX_CPU, nullptr));

    // After cx_pack, which has checked that these parts are there exactly if the weight needs them.
    own(view_.codebook, size_t{1} << format.bits, codebook_);
    own(view_.nested_map, 256, nested_map_);
    own(view_.nested_absmax, static_cast<size_t>(canonical.nested_absmax_count), nested_absmax_);
    own(view_.nested_offset, 1, nested_offset_);
    own(view_.tensor_scale, 1, tensor_scale_);
  }

  PackedWeight(PackedWeight&&) = default;  // and no copies: the pointers of view_ go with the buffers
  PackedWeight& operator=(PackedWeight&&) = default;

  const cx_weight& view() const noexcept { return view_; }
  operator const cx_weight&() const noexcept { return view_; }
  int64_t n() const noexcept { return view_.n; }
  int64_t k() const noexcept { return view_.k; }
  size_t bytes() const noexcept { return view_.codes_bytes + view_.scales_bytes + view_.zeros_bytes; }

 private:
  static void* allocate(size_t bytes, AlignedBuffer& buffer) {
    buffer = make_buffer(bytes);
    return bytes ? buffer.data() : nullptr;
  }
  static void own(const float*& part, size_t count, std::vector<float>& copy) {
    if (!part) return;
    copy.assign(part, part + count);
    part = copy.data();
  }

  cx_weight view_;
  AlignedBuffer codes_, scales_, zeros_;
  std::vector<float> codebook_, nested_map_, nested_absmax_, nested_offset_, tensor_scale_;
};

namespace detail {

// Not deduced: the output alone says the element type, so that braces, conversions and a null bias work in a call.
template <typename T>
using ConstView = std::common_type_t<MatrixView<const T>>;
template <typename T>
using ConstPointer = std::common_type_t<const T*>;

inline void check_extent(const char* function, const char* argument, int64_t expected, int64_t got) {
  if (expected == got) return;
  throw Error(CX_INVALID_ARGUMENT, std::string(function) + ": " + argument + ": expected " + std::to_string(expected) +
                                       ", got " + std::to_string(got));
}

template <typename T>
void check_dtype(const char* function, cx_dtype dtype) {
  check_extent(function, "options.dtype: bytes of an element", sizeof(T), dtype == CX_FP32 ? 4 : 2);
}

template <typename T>
cx_gemm_args gemm_args(const cx_weight& weight, MatrixView<const T> x, MatrixView<T> y, const T* bias,
                       const Options& options) {
  check_dtype<T>("gemm", options.dtype);
  const bool transposed = (options.flags & CX_GEMM_TRANSPOSED) != 0;
  check_extent("gemm", transposed ? "x: columns (N)" : "x: columns (K)", transposed ? weight.n : weight.k, x.cols);
  check_extent("gemm", transposed ? "y: columns (K)" : "y: columns (N)", transposed ? weight.k : weight.n, y.cols);
  check_extent("gemm", "y: rows (M)", x.rows, y.rows);
  return {&weight,      options.dtype,  x.rows,         x.data,  x.ld, y.data,           y.ld,
          bias,         options.device, options.stream, nullptr, 0,    options.instance, options.threads,
          options.flags};
}

}  // namespace detail

template <typename T>
size_t gemm_workspace_bytes(const cx_weight& weight, detail::ConstView<T> x, MatrixView<T> y,
                            detail::ConstPointer<T> bias, const Options& options = {}) {
  const cx_gemm_args args = detail::gemm_args<T>(weight, x, y, bias, options);
  size_t bytes = 0;
  check(cx_gemm_workspace(&args, &bytes));
  return bytes;
}

// y[M, N] = x[M, K] @ weight^T + bias, with `bias` [N] or null, in the caller's workspace. With CX_GEMM_TRANSPOSED in
// the options' flags y[M, K] = x[M, N] @ weight + bias, with `bias` [K] or null.
template <typename T>
void gemm(const cx_weight& weight, detail::ConstView<T> x, MatrixView<T> y, detail::ConstPointer<T> bias,
          void* workspace, size_t workspace_bytes, const Options& options = {}) {
  cx_gemm_args args = detail::gemm_args<T>(weight, x, y, bias, options);
  args.workspace = workspace;
  args.workspace_bytes = workspace_bytes;
  check(cx_gemm(&args));
}

// The same on the CPU, in a workspace that is kept from call to call.
template <typename T>
void gemm(const cx_weight& weight, detail::ConstView<T> x, MatrixView<T> y, detail::ConstPointer<T> bias,
          Workspace& workspace, const Options& options = {}) {
  const size_t bytes = gemm_workspace_bytes<T>(weight, x, y, bias, options);
  gemm<T>(weight, x, y, bias, workspace.reserve(bytes), bytes, options);
}

// out[N, K] = the weight.
template <typename T>
void dequantize(const cx_weight& packed, MatrixView<T> out, const Options& options = {}) {
  detail::check_dtype<T>("dequantize", options.dtype);
  detail::check_extent("dequantize", "out: rows (N)", packed.n, out.rows);
  detail::check_extent("dequantize", "out: columns (K)", packed.k, out.cols);
  check(cx_dequantize(&packed, options.dtype, out.data, out.ld, options.device, options.stream, options.instance,
                      options.threads));
}

}  // namespace cutlass_ext
