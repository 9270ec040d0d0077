#include "cutlass_ext/quantize.hpp"

#include <cinttypes>
#include <cmath>

#include "cutlass_ext/check.hpp"
#include "cutlass_ext/status.hpp"
#ifdef CUTLASS_EXT_CUDA
#include "kernels/cuda/quantize.hpp"
#endif

namespace cutlass_ext {

#ifdef CUTLASS_EXT_CUDA

static_assert(sizeof(cx_quantize_status) == sizeof(cuda::QuantizeStatus));

size_t quantize_workspace(const cx_weight& w, const Format& format) {
  Weight weight{};
  weight.n = w.n;
  weight.k = w.k;
  weight.group_size = w.group_size;
  weight.scale_type = static_cast<ScaleType>(w.scale_type);
  weight.flat_scales = layout::scales_are_flat(format.flat_blocks, w.k, w.group_size);
  return cuda::quantize_workspace(weight);
}

// A codebook that quantizes: finite, and not all zero.
static cx_status check_codebook(const char* function, const float* codebook, int levels) {
  bool any = false;
  for (int i = 0; i < levels; ++i) {
    if (!std::isfinite(codebook[i])) {
      return fail(CX_INVALID_ARGUMENT, function, "weight.codebook: expected finite values, got %g", codebook[i]);
    }
    any = any || codebook[i] != 0;
  }
  return any ? CX_OK : fail(CX_INVALID_ARGUMENT, function, "weight.codebook: expected a value that is not 0, got none");
}

cx_status quantize(const char* function, const cx_quantize_args* args) {
  if (args == nullptr) return fail(CX_INVALID_ARGUMENT, function, "args: expected a pointer, got NULL");
  Device device;
  CX_TRY(check_device(function, args->device, &device));
  if (device != Device::kCuda) {
    return fail(CX_NOT_SUPPORTED, function, "device: expected CX_CUDA, got CX_CPU");
  }
  cuda::QuantizeProblem problem{};
  CX_TRY(check_weight(function, args->weight, CX_CANONICAL, &problem.weight));
  CX_TRY(check_dtype(function, args->dtype));
  const Format& format = kFormats[args->weight->format];
  const Weight& w = problem.weight;
  if (w.is_codebook) CX_TRY(check_codebook(function, w.codebook, format.levels()));
  if (args->w == nullptr || args->status == nullptr) {
    return fail(CX_INVALID_ARGUMENT, function, "%s: expected a pointer, got NULL", args->w == nullptr ? "w" : "status");
  }
  if (args->ldw < 0 || (w.flat_scales && w.n > 1 && args->ldw != w.k)) {
    return fail(CX_INVALID_ARGUMENT, function, "ldw: expected %s, got %" PRId64,
                w.flat_scales ? "K, because blocks cross row ends" : ">= 0", args->ldw);
  }
  const size_t needed = cuda::quantize_workspace(w);
  if (args->workspace_bytes < needed) {
    return fail(CX_WORKSPACE_TOO_SMALL, function, "workspace_bytes: expected at least %zu, got %zu", needed,
                args->workspace_bytes);
  }
  constexpr uintptr_t kAlignment = 64;
  if (needed > 0 && (args->workspace == nullptr || reinterpret_cast<uintptr_t>(args->workspace) % kAlignment != 0)) {
    return fail(CX_INVALID_ARGUMENT, function, "workspace: expected a pointer aligned to %zu bytes, got %p",
                static_cast<size_t>(kAlignment), args->workspace);
  }
  problem.weight.codebook_on_device = false;
  problem.steps = static_cast<float>(format.levels() / 2) - format.half_step;
  problem.ties_to_even = format.ties_to_even;
  problem.dtype = static_cast<DType>(args->dtype);
  problem.w = args->w;
  problem.ld = args->ldw;
  problem.status = reinterpret_cast<cuda::QuantizeStatus*>(args->status);
  problem.workspace = args->workspace;
  problem.stream = args->stream;
  const char* error = cuda::quantize(problem);
  return error == nullptr ? CX_OK : fail(CX_INTERNAL, function, "CUDA reports: %s", error);
}

#else

size_t quantize_workspace(const cx_weight&, const Format&) { return 0; }

cx_status quantize(const char* function, const cx_quantize_args* args) {
  if (args == nullptr) return fail(CX_INVALID_ARGUMENT, function, "args: expected a pointer, got NULL");
  Device device;
  CX_TRY(check_device(function, args->device, &device));
  return fail(CX_NOT_SUPPORTED, function, "device: expected CX_CUDA, got CX_CPU");
}

#endif

}  // namespace cutlass_ext
