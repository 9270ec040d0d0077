// The C API: checks, then the dispatch, then the kernel.
#include <cerrno>
#include <cinttypes>
#include <cstring>
#include <fstream>
#include <sstream>

#include "cutlass_ext/check.hpp"
#include "cutlass_ext/cutlass_ext.h"
#include "cutlass_ext/device_name.hpp"
#include "cutlass_ext/dispatch.hpp"
#include "cutlass_ext/pack.hpp"
#include "cutlass_ext/quantize.hpp"
#include "cutlass_ext/status.hpp"
#include "cutlass_ext/table.hpp"
#ifdef CUTLASS_EXT_CUDA
#include "kernels/cuda/read_floor.hpp"
#endif

namespace cutlass_ext {
namespace {

constexpr uintptr_t kWorkspaceAlignment = 64;

// `run` is the entry of Instance that the caller needs, `kind` its name in a message.
template <class Run>
cx_status check_instance(const char* function, int32_t index, Device device, Run Instance::* run, const char* kind) {
  if (index < 0 || index >= instance_count()) {
    return fail(CX_INVALID_ARGUMENT, function, "instance: expected -1..%d, got %" PRId32, instance_count() - 1, index);
  }
  const Instance& instance = instance_at(index);
  if (instance.*run == nullptr || instance.device != device) {
    return fail(CX_INVALID_ARGUMENT, function, "instance: expected %s for the %s, got %s", kind,
                device == Device::kCpu ? "CPU" : "GPU", instance.name);
  }
  if (!instance.available()) {
    return fail(CX_NOT_SUPPORTED, function, "instance: this machine cannot run %s", instance.name);
  }
  return CX_OK;
}

// The checked problem and the instance that runs it.
cx_status resolve_gemm(const char* function, const cx_gemm_args* args, GemmProblem* problem, int* index) {
  CX_TRY(check_gemm(function, args, problem));
  if (args->instance == -1) {
    *index = select_gemm(*problem, (args->flags & CX_GEMM_DENSE_FALLBACK) != 0);
    if (*index >= 0) return CX_OK;
    return fail(CX_NOT_SUPPORTED, function, "instance: this build has none for the problem");
  }
  CX_TRY(check_instance(function, args->instance, problem->device, &Instance::gemm, "a GEMM"));
  const Instance& instance = instance_at(args->instance);
  if (!covers(instance, *problem)) {
    return fail(CX_NOT_SUPPORTED, function, "instance: %s does not cover this weight, dtype or shape", instance.name);
  }
  *index = args->instance;
  return CX_OK;
}

size_t workspace_of(const Instance& instance, const GemmProblem& problem) {
  return instance.workspace_bytes == nullptr ? 0 : instance.workspace_bytes(problem);
}

// What a kernel's launch returned.
cx_status check_launch(const char* function, const Instance& instance, const char* error) {
  if (error == nullptr) return CX_OK;
  return fail(CX_INTERNAL, function, "%s: CUDA reports: %s", instance.name, error);
}

}  // namespace
}  // namespace cutlass_ext

using namespace cutlass_ext;

int32_t cx_version(void) { return CX_VERSION_MAJOR * 10000 + CX_VERSION_MINOR * 100 + CX_VERSION_PATCH; }

const char* cx_last_error(void) { return last_error(); }

const char* cx_build_info(void) { return CX_BUILD_INFO; }

int32_t cx_format_count(void) { return kFormatCount; }

cx_status cx_get_format(int32_t id, cx_format_info* info) {
  if (id < 0 || id >= kFormatCount) {
    return fail(CX_INVALID_ARGUMENT, __func__, "id: expected 0..%d, got %" PRId32, kFormatCount - 1, id);
  }
  if (info == nullptr) return fail(CX_INVALID_ARGUMENT, __func__, "info: expected a pointer, got NULL");
  const Format& f = kFormats[id];
  *info = {f.id,          f.name,         f.bits,        f.is_codebook(), f.encoding == Encoding::kSigned,
           f.flat_blocks, f.tensor_scale, f.scale_types, f.zero_types,    f.codebook};
  return CX_OK;
}

int32_t cx_instance_count(void) { return instance_count(); }

cx_status cx_get_instance(int32_t index, cx_instance_info* info) {
  if (index < 0 || index >= instance_count()) {
    return fail(CX_INVALID_ARGUMENT, __func__, "index: expected 0..%d, got %" PRId32, instance_count() - 1, index);
  }
  if (info == nullptr) return fail(CX_INVALID_ARGUMENT, __func__, "info: expected a pointer, got NULL");
  const Instance& instance = instance_at(index);
  *info = {instance.name, instance.device == Device::kCpu ? CX_CPU : CX_CUDA, instance.available(),
           instance.gemm != nullptr, instance.family == Family::kTransposed};
  return CX_OK;
}

cx_status cx_select_instance(const cx_gemm_args* args, int32_t* index) {
  GemmProblem problem;
  if (index == nullptr) return fail(CX_INVALID_ARGUMENT, __func__, "index: expected a pointer, got NULL");
  return resolve_gemm(__func__, args, &problem, index);
}

cx_status cx_device_name(cx_device device, const char** name) {
  Device checked;
  CX_TRY(check_device(__func__, device, &checked));
  if (name == nullptr) return fail(CX_INVALID_ARGUMENT, __func__, "name: expected a pointer, got NULL");
  *name = name_device(checked).name;
  return CX_OK;
}

cx_status cx_load_table(const char* path) {
  if (path == nullptr) {
    use_table(nullptr);
    return CX_OK;
  }
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  if (!file || !(text << file.rdbuf())) {
    return fail(CX_INVALID_ARGUMENT, __func__, "path: cannot read %s: %s", path,
                errno == 0 ? "it is empty" : std::strerror(errno));
  }
  const std::string content = text.str();
  const std::string error = use_table(&content);
  return error.empty() ? CX_OK : fail(CX_INVALID_ARGUMENT, __func__, "path: %s: %s", path, error.c_str());
}

const char* cx_table_instance(int32_t index) {
  return index < 0 || index >= table_instance_count() ? nullptr : table_instance_name(index);
}

cx_status cx_find_in_table(const cx_table_query* query, cx_table_answer* answer) {
  if (query == nullptr || query->device == nullptr || query->encoding == nullptr) {
    return fail(CX_INVALID_ARGUMENT, __func__, "query: expected pointers, got NULL");
  }
  if (answer == nullptr) return fail(CX_INVALID_ARGUMENT, __func__, "answer: expected a pointer, got NULL");
  TableEncoding encoding;
  if (!parse_encoding(query->encoding, &encoding)) {
    return fail(CX_INVALID_ARGUMENT, __func__, "encoding: expected such as int4 or codebook4-nested, got %s",
                query->encoding);
  }
  CX_TRY(check_dtype(__func__, query->dtype));
  if (query->n < 1 || query->k < 1 || query->group_size < 1 || query->m < 0) {
    return fail(CX_INVALID_ARGUMENT, __func__,
                "query: expected positive n, k and group_size, got %" PRId64 ", %" PRId64 " and %" PRId64, query->n,
                query->k, query->group_size);
  }
  const TableEntry* entry =
      search_entry({kNoDevice, query->device, query->processors},
                   {encoding.id(), static_cast<DType>(query->dtype), query->group_size, query->n, query->k, query->m});
  if (entry == nullptr) {
    return fail(CX_NOT_SUPPORTED, __func__, "no table for %s has %s with this dtype", query->device, query->encoding);
  }
  const TableBucket& bucket = entry->at(query->m);
  const int64_t first = &bucket == entry->buckets.data() ? 1 : (&bucket)[-1].last + 1;
  *answer = {table_instance_name(bucket.instance),
             bucket.gemm < 0 ? nullptr : table_instance_name(bucket.gemm),
             entry->group_size,
             entry->n,
             entry->k,
             first,
             bucket.last,
             entry->predicted};
  return CX_OK;
}

cx_status cx_predict(const cx_prediction* query, double* ns) {
  if (query == nullptr || ns == nullptr || query->coefficients == nullptr || query->n == nullptr ||
      query->k == nullptr || query->m == nullptr) {
    return fail(CX_INVALID_ARGUMENT, __func__, "expected pointers, got NULL");
  }
  if (query->family < 0 || query->family >= kModelFamilies) {
    return fail(CX_INVALID_ARGUMENT, __func__, "family: expected 0 to %d, got %d", kModelFamilies - 1, query->family);
  }
  if (query->processors < 1) {
    return fail(CX_INVALID_ARGUMENT, __func__, "processors: expected at least 1, got %d", query->processors);
  }
  for (int64_t i = 0; i < query->count; ++i) {
    ns[i] = predict(static_cast<ModelFamily>(query->family), query->coefficients,
                    {query->n[i], query->k[i], query->m[i], query->processors});
  }
  return CX_OK;
}

cx_status cx_weight_bytes(const cx_weight* weight, cx_weight_sizes* sizes) {
  const Format* format = nullptr;
  CX_TRY(check_spec(__func__, weight, &format));
  if (sizes == nullptr) return fail(CX_INVALID_ARGUMENT, __func__, "sizes: expected a pointer, got NULL");
  *sizes = weight_sizes(*weight, *format);
  return CX_OK;
}

cx_status cx_pack(const cx_weight* from, cx_weight* to, cx_device device, void* stream) {
  return convert_layout(__func__, from, CX_CANONICAL, to, device, stream);
}

cx_status cx_unpack(const cx_weight* from, cx_weight* to, cx_device device, void* stream) {
  return convert_layout(__func__, from, CX_PACKED, to, device, stream);
}

cx_status cx_dequantize(const cx_weight* weight, cx_dtype dtype, void* out, int64_t ld, cx_device device, void* stream,
                        int32_t instance, int32_t threads) {
  DequantizeProblem problem;
  CX_TRY(check_device(__func__, device, &problem.device));
  const bool canonical = weight != nullptr && weight->layout == CX_CANONICAL;
  if (canonical && problem.device == Device::kCpu) {
    return fail(CX_NOT_SUPPORTED, __func__, "weight.layout: expected packed on the CPU, got canonical");
  }
  CX_TRY(check_weight(__func__, weight, canonical ? CX_CANONICAL : CX_PACKED, &problem.weight));
  CX_TRY(check_dtype(__func__, dtype));
  if (out == nullptr) return fail(CX_INVALID_ARGUMENT, __func__, "out: expected a pointer, got NULL");
  if (weight->n > 1 && ld < weight->k) {
    return fail(CX_INVALID_ARGUMENT, __func__, "ld: expected at least K=%" PRId64 ", got %" PRId64, weight->k, ld);
  }
  CX_TRY(resolve_threads(__func__, threads, &problem.threads));
  problem.dtype = static_cast<DType>(dtype);
  problem.out = out;
  problem.ld = ld;
  problem.stream = stream;
  if (instance == -1) {
    instance = select_dequantize(problem.device);
    if (instance < 0) return fail(CX_NOT_SUPPORTED, __func__, "instance: this build has none for the device");
  } else {
    CX_TRY(check_instance(__func__, instance, problem.device, &Instance::dequantize, "a dequant kernel"));
  }
  return check_launch(__func__, instance_at(instance), instance_at(instance).dequantize(problem));
}

cx_status cx_quantize_workspace(const cx_weight* weight, size_t* bytes) {
  const Format* format = nullptr;
  CX_TRY(check_spec(__func__, weight, &format));
  if (bytes == nullptr) return fail(CX_INVALID_ARGUMENT, __func__, "bytes: expected a pointer, got NULL");
  *bytes = quantize_workspace(*weight, *format);
  return CX_OK;
}

cx_status cx_quantize(const cx_quantize_args* args) { return quantize(__func__, args); }

cx_status cx_read_floor(const void* data, size_t bytes, void* scratch, cx_device device, void* stream) {
  Device checked;
  CX_TRY(check_device(__func__, device, &checked));
#ifdef CUTLASS_EXT_CUDA
  if (checked == Device::kCuda) {
    const char* error = cuda::read_floor(data, bytes, scratch, stream);
    return error == nullptr ? CX_OK : fail(CX_INTERNAL, __func__, "CUDA reports: %s", error);
  }
#endif
  (void)data, (void)bytes, (void)scratch, (void)stream;
  return fail(CX_NOT_SUPPORTED, __func__, "device: expected CX_CUDA, got CX_CPU");
}

cx_status cx_gemm_workspace(const cx_gemm_args* args, size_t* bytes) {
  GemmProblem problem;
  int index = 0;
  if (bytes == nullptr) return fail(CX_INVALID_ARGUMENT, __func__, "bytes: expected a pointer, got NULL");
  CX_TRY(resolve_gemm(__func__, args, &problem, &index));
  if (instance_at(index).gemm == nullptr) {
    return fail(CX_INVALID_ARGUMENT, __func__, "flags: expected none of CX_GEMM_DENSE_FALLBACK");
  }
  *bytes = problem.m == 0 ? 0 : workspace_of(instance_at(index), problem);
  return CX_OK;
}

cx_status cx_gemm(const cx_gemm_args* args) {
  GemmProblem problem;
  int index = 0;
  CX_TRY(resolve_gemm(__func__, args, &problem, &index));
  if (problem.m == 0) return CX_OK;
  const Instance& instance = instance_at(index);
  if (instance.gemm == nullptr) {
    return fail(CX_INVALID_ARGUMENT, __func__, "flags: expected none of CX_GEMM_DENSE_FALLBACK");
  }
  const size_t needed = workspace_of(instance, problem);
  if (args->workspace_bytes < needed) {
    return fail(CX_WORKSPACE_TOO_SMALL, __func__, "workspace_bytes: expected at least %zu, got %zu", needed,
                args->workspace_bytes);
  }
  if (needed > 0 &&
      (args->workspace == nullptr || reinterpret_cast<uintptr_t>(args->workspace) % kWorkspaceAlignment)) {
    return fail(CX_INVALID_ARGUMENT, __func__, "workspace: expected a pointer aligned to %zu bytes, got %p",
                static_cast<size_t>(kWorkspaceAlignment), args->workspace);
  }
  return check_launch(__func__, instance, instance.gemm(problem));
}
