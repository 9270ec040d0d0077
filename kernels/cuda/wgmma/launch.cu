#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>
#include <set>
#include <utility>

#include "kernels/cuda/launch.hpp"
#include "kernels/cuda/stream/codebook_factor.hpp"
#include "kernels/cuda/wgmma/launch.cuh"
#include "kernels/decode.hpp"

namespace cutlass_ext::cuda::wgmma {
namespace {

constexpr int kMaxDevices = 64;

// Shared memory above 48 KB must be allowed for a kernel, once per device.
cudaError_t allow_shared_memory(const void* function) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  thread_local std::set<std::pair<const void*, int>> allowed;
  if (!allowed.insert({function, device}).second) return cudaSuccess;
  const int bytes = device_properties().shared_bytes;
  return cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found at run time so that the library also loads where there is no driver.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess) cudaGetLastError();
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(found) : nullptr;
  }();
  return function;
}

struct Box {
  CUtensorMapDataType type;
  int64_t columns, rows, row_bytes;  // of the tensor
  int box_columns, box_rows;
  CUtensorMapSwizzle swizzle;
};

// Copies of a box; zeros behind the tensor.
bool encode(const void* data, const Box& box, CUtensorMap* map) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(box.columns), static_cast<cuuint64_t>(box.rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(box.row_bytes)};
  const cuuint32_t boxes[2] = {static_cast<cuuint32_t>(box.box_columns), static_cast<cuuint32_t>(box.box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  return encode_tiled()(map, box.type, 2, const_cast<void*>(data), sizes, strides, boxes, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, box.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// The slabs' codes, scales or zeros, of which a copy takes `box_pieces` of some slabs.
bool encode_slabs(const void* data, int64_t slab_bytes, int piece_bytes, int box_pieces, const Params& p,
                  CUtensorMap* map) {
  const CUtensorMapDataType type = piece_bytes == 8 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT64 : CU_TENSOR_MAP_DATA_TYPE_INT32;
  return encode(data, {type, slab_bytes / piece_bytes, p.slabs, slab_bytes, box_pieces, p.slabs_per_cta,
                       CU_TENSOR_MAP_SWIZZLE_NONE}, map);
}

bool encode_all(const GemmProblem& problem, const Params& p, const Plan& plan, Arguments* to) {
  if (encode_tiled() == nullptr) return false;
  const Weight& w = problem.weight;
  const CUtensorMapDataType type =
      problem.dtype == DType::kFp16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  // One token has no stride, but must be given one.
  const int64_t ldx = problem.m > 1 ? problem.ldx : layout::ceil_div(w.k, 8) * 8;
  const int64_t slab_scales = layout::packed_groups(w.k, w.group_size) * layout::kBlockRows;
  return encode(problem.x, {type, w.k, problem.m, ldx * 2, layout::kBlockK, plan.box_tokens, CU_TENSOR_MAP_SWIZZLE_128B},
                &to->x) &&
         encode_slabs(w.codes, layout::blocks_along_k(w.k) * layout::block_bytes(4), kCodePieceBytes,
                      layout::block_bytes(4) / kCodePieceBytes, p, &to->codes) &&
         encode_slabs(w.scales, slab_scales * p.scale_bytes, kScalePieceBytes, p.group_scale_pieces, p, &to->scales) &&
         (p.zero_bytes == 0 || encode_slabs(w.zeros, slab_scales * p.zero_bytes, kScalePieceBytes, p.group_zero_pieces,
                                            p, &to->zeros));
}

float best_factor(const float* codebook, DType dtype) {
  const auto round = [&](float v) {
    return dtype == DType::kFp16 ? fp16_to_float(float_to_fp16(v)) : bf16_to_float(float_to_bf16(v));
  };
  float best = 1;
  for (int i = 1; i < stream::kFactors; ++i) {
    const float factor = stream::factor_at(i);
    if (stream::rounding_error(codebook, factor, round) < stream::rounding_error(codebook, best, round)) best = factor;
  }
  return best;
}

}  // namespace

float factor_of_codebook(const Weight& weight, DType dtype) {
  if (weight.codebook_on_device) return 1;
  struct Factors {
    float of[kFormatCount][2];
    Factors() {
      for (int i = 0; i < kFormatCount; ++i) {
        const bool found = kFormats[i].codebook != nullptr && kFormats[i].levels() == kCodebookSize;
        of[i][0] = found ? best_factor(kFormats[i].codebook, DType::kBf16) : 1;
        of[i][1] = found ? best_factor(kFormats[i].codebook, DType::kFp16) : 1;
      }
    }
  };
  static const Factors factors;
  for (int i = 0; i < kFormatCount; ++i) {
    if (kFormats[i].codebook == weight.codebook) return factors.of[i][dtype == DType::kFp16];
  }
  return 1;
}

bool runs_here(const void* function) {
#ifdef CX_SM90A
  enum : char { kUnknown, kNo, kYes };
  static std::atomic<char> known[kMaxDevices];
  int device = 0;
  if (!device_available() || cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) {
    cudaGetLastError();
    return false;
  }
  if (known[device] == kUnknown) {
    cudaFuncAttributes attributes;
    const bool loads = cudaFuncGetAttributes(&attributes, function) == cudaSuccess;
    if (!loads) cudaGetLastError();
    // What PTX was compiled for decides too: sm_80 code has no wgmma.
    const bool hopper = loads && attributes.binaryVersion == 90 && attributes.ptxVersion == 90;
    known[device] = hopper && encode_tiled() != nullptr ? kYes : kNo;
  }
  return known[device] == kYes;
#else
  (void)function;
  return false;
#endif
}

bool fits(const GemmProblem& problem) {
  const Weight& w = problem.weight;
  constexpr int64_t kMaxStride = int64_t{1} << 40;  // of a tensor map, in bytes
  return w.bits == 4 && !w.flat_scales && is_aligned(problem.x, 16) &&
         (problem.m <= 1 || (problem.ldx % 8 == 0 && problem.ldx >= w.k && problem.ldx * 2 < kMaxStride));
}

Params params_of(const GemmProblem& problem) {
  const Weight& w = problem.weight;
  Params p{};
  p.scale_type = static_cast<int32_t>(w.scale_type);
  p.zero_type = static_cast<int32_t>(w.zero_type);
  p.bias_of_codes = w.bias;
  if (w.is_codebook) {
    if (w.codebook_on_device) {
      p.codebook_data = w.codebook;
    } else {
      for (int i = 0; i < kCodebookSize; ++i) p.codebook[i] = w.codebook[i];
    }
  }
  p.nested_map = w.nested_map;
  p.nested_absmax = w.nested_absmax;
  p.nested_offset = w.nested_offset;
  p.tensor_scale = w.tensor_scale;
  p.groups = static_cast<int32_t>(w.groups());
  p.m = static_cast<int32_t>(problem.m);
  p.n = static_cast<int32_t>(w.n);
  p.programmatic_launch = problem.programmatic_launch;
  p.y_vector = w.n % 8 == 0 && is_aligned(problem.y, 16) && (problem.m <= 1 || problem.ldy % 8 == 0);
  p.y = problem.y;
  p.ldy = problem.ldy;
  p.bias = problem.bias;
  return p;
}

const char* launch(const void* function, const GemmProblem& problem, const Params& params, const Plan& plan) {
  Arguments arguments;
  arguments.params = params;
  if (!encode_all(problem, params, plan, &arguments)) return "cuTensorMapEncodeTiled refuses x or the weight";
  cudaError_t error = allow_shared_memory(function);
  if (error == cudaSuccess) {
    const int cluster = plan.split.cluster_n * plan.split.cluster_k;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(plan.clusters * cluster));
    config.blockDim = dim3(static_cast<unsigned>(plan.threads));
    config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
    config.stream = static_cast<cudaStream_t>(problem.stream);
    cudaLaunchAttribute attributes[2];
    if (cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    }
    if (problem.programmatic_launch) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    config.attrs = attributes;
    void* values[] = {&arguments};
    error = cudaLaunchKernelExC(&config, function, values);
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // not to be found by somebody else's check
  return cudaGetErrorString(error);
}

}  // namespace cutlass_ext::cuda::wgmma
