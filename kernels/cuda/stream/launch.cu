#include <set>
#include <utility>

#include "kernels/cuda/stream/launch.cuh"

namespace cutlass_ext::cuda::stream {
namespace {

bool aligned(const void* pointer, int64_t elements, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0 && elements * 2 % bytes == 0;
}

// Shared memory above 48 KB must be allowed for a kernel, once per device.
cudaError_t allow_shared_memory(const void* function) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  thread_local std::set<std::pair<const void*, int>> allowed;
  if (!allowed.insert({function, device}).second) return cudaSuccess;
  const int bytes = device_properties().shared_bytes;
  return cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

}  // namespace

Params params_of(const GemmProblem& problem, int64_t first_token, int tokens) {
  const Weight& w = problem.weight;
  Params p{};
  p.codes = w.codes;
  p.scales = static_cast<const uint8_t*>(w.scales);
  p.zeros = static_cast<const uint8_t*>(w.zeros);
  p.x = static_cast<const uint16_t*>(problem.x) + first_token * problem.ldx;
  p.ldx = static_cast<uint32_t>(problem.ldx);
  p.k = static_cast<int32_t>(w.k);
  p.scale_type = static_cast<int32_t>(w.scale_type);
  p.zero_type = static_cast<int32_t>(w.zero_type);
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
  p.n = static_cast<int32_t>(w.n);
  p.y = static_cast<uint16_t*>(problem.y) + first_token * problem.ldy;
  p.ldy = problem.ldy;
  p.bias = problem.bias;
  p.x_vector = w.k % 8 == 0 && aligned(p.x, tokens > 1 ? problem.ldx : 0, 16);
  p.programmatic_launch = problem.programmatic_launch;
  p.y_pairs = aligned(p.y, tokens > 1 ? problem.ldy : 0, 4);
  return p;
}

const char* launch(const void* function, const GemmProblem& problem, const Params& params, const Plan& plan) {
  cudaError_t error = allow_shared_memory(function);
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(plan.split.cluster), static_cast<unsigned>(plan.clusters));
    config.blockDim =
        dim3(kThreadsPerWarp, static_cast<unsigned>(plan.split.row_warps), static_cast<unsigned>(plan.split.k_warps));
    config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
    config.stream = static_cast<cudaStream_t>(problem.stream);
    cudaLaunchAttribute attributes[2];
    if (plan.split.cluster > 1) {
      cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {static_cast<unsigned>(plan.split.cluster), 1, 1};
    }
    if (problem.programmatic_launch && device_properties().clusters) {
      cudaLaunchAttribute& programmatic = attributes[config.numAttrs++];
      programmatic.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      programmatic.val.programmaticStreamSerializationAllowed = 1;
    }
    config.attrs = attributes;
    void* arguments[] = {const_cast<Params*>(&params)};
    error = cudaLaunchKernelExC(&config, function, arguments);
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // not to be found by somebody else's check
  return cudaGetErrorString(error);
}

}  // namespace cutlass_ext::cuda::stream
