#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>

#include "kernels/cuda/cluster_launch.hpp"
#include "kernels/cuda/launch.hpp"
#include "kernels/cuda/wgmma/launch.cuh"
#include "kernels/decode.hpp"

namespace cutlass_ext::cuda::wgmma {
namespace {

constexpr int kMaxDevices = 64;

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found at run time so that the library also loads where there is no driver.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess) cudaGetLastError();
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(found)
                                                                         : nullptr;
  }();
  return function;
}

// Copies of a box of a tensor of `columns` x `rows` x `slices`, zeros behind it; strides in bytes.
struct Box {
  CUtensorMapDataType type;
  int64_t columns, rows, slices;
  int64_t row_stride, slice_stride;
  int box_columns, box_rows, box_slices;
  CUtensorMapSwizzle swizzle;
};

bool encode(const void* data, const Box& box, CUtensorMap* map) {
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(box.columns), static_cast<cuuint64_t>(box.rows),
                               static_cast<cuuint64_t>(box.slices)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(box.row_stride), static_cast<cuuint64_t>(box.slice_stride)};
  const cuuint32_t boxes[3] = {static_cast<cuuint32_t>(box.box_columns), static_cast<cuuint32_t>(box.box_rows),
                               static_cast<cuuint32_t>(box.box_slices)};
  const cuuint32_t steps[3] = {1, 1, 1};
  return encode_tiled()(map, box.type, box.slices == 0 ? 2 : 3, const_cast<void*>(data), sizes, strides, boxes, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, box.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

constexpr CUtensorMapDataType kPieceType = CU_TENSOR_MAP_DATA_TYPE_FLOAT64;  // eight bytes of anything

bool encode_codes(const GemmProblem& problem, const Params& p, const Plan& plan, CUtensorMap* map) {
  constexpr int kBytes = layout::block_bytes(4);
  const int64_t blocks = layout::blocks_along_k(problem.weight.k);
  return encode(problem.weight.codes,
                {kPieceType, kBytes / kPieceBytes, blocks, p.slabs, kBytes, blocks * kBytes, kBytes / kPieceBytes,
                 plan.chunk_blocks, p.slabs_per_cta, CU_TENSOR_MAP_SWIZZLE_NONE},
                map);
}

// Scales or zeros, of `bytes` each: the groups of a chunk of some slabs.
bool encode_groups(const GemmProblem& problem, const void* data, int bytes, int box_pieces, const Params& p,
                   CUtensorMap* map) {
  const Weight& w = problem.weight;
  const int64_t slab_bytes = layout::packed_groups(w.k, w.group_size) * layout::kBlockRows * bytes;
  return encode(data,
                {kPieceType, slab_bytes / kPieceBytes, p.slabs, 0, slab_bytes, 0, box_pieces, p.slabs_per_cta, 1,
                 CU_TENSOR_MAP_SWIZZLE_NONE},
                map);
}

// 64 k of some tokens, in the order that the MMA reads.
bool encode_x(const GemmProblem& problem, int tile_tokens, CUtensorMap* map) {
  const int64_t k = problem.weight.k;
  const CUtensorMapDataType type =
      problem.dtype == DType::kFp16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  // One token has no stride, but must be given one.
  const int64_t ldx = problem.m > 1 ? problem.ldx : layout::ceil_div(k, 8) * 8;
  return encode(problem.x,
                {type, k, problem.m, 0, ldx * 2, 0, layout::kBlockK, tile_tokens, 1, CU_TENSOR_MAP_SWIZZLE_128B}, map);
}

bool encode_all(const GemmProblem& problem, const Params& p, const Plan& plan, Arguments* to) {
  const Weight& w = problem.weight;
  return encode_tiled() != nullptr && encode_x(problem, p.tile_tokens, &to->x) &&
         encode_codes(problem, p, plan, &to->codes) &&
         encode_groups(problem, w.scales, p.scale_bytes, p.group_scale_pieces, p, &to->scales) &&
         (p.zero_bytes == 0 || encode_groups(problem, w.zeros, p.zero_bytes, p.group_zero_pieces, p, &to->zeros));
}

}  // namespace

bool runs_here(const void* function) {
#ifdef CX_SM90A
  enum : char { kUnknown, kCannot, kCan };
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
    known[device] = hopper && encode_tiled() != nullptr ? kCan : kCannot;
  }
  return known[device] == kCan;
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
  arguments.token_tiles = cutlass::FastDivmod(params.token_tiles);
  arguments.params = params;
  if (!encode_all(problem, params, plan, &arguments)) return "cuTensorMapEncodeTiled refuses x or the weight";
  const LaunchShape shape{dim3(static_cast<unsigned>(plan.clusters * plan.split.cluster)),
                          dim3(static_cast<unsigned>(plan.threads)),
                          plan.shared_bytes,
                          plan.split.cluster,
                          problem.programmatic_launch,
                          problem.stream};
  return cuda::launch(function, shape, static_cast<const void*>(&arguments));
}

}  // namespace cutlass_ext::cuda::wgmma
