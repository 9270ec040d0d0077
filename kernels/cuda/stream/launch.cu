#include "kernels/cuda/cluster_launch.hpp"
#include "kernels/cuda/stream/launch.cuh"

namespace cutlass_ext::cuda::stream {
namespace {

bool aligned(const void* pointer, int64_t elements, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0 && elements * 2 % bytes == 0;
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
  const auto count = [](int v) { return static_cast<unsigned>(v); };
  const Split& split = plan.split;
  const LaunchShape shape{dim3(count(split.cluster), count(plan.clusters)),
                          dim3(kThreadsPerWarp, count(split.row_warps), count(split.k_warps)),
                          plan.shared_bytes,
                          split.cluster,
                          problem.programmatic_launch && device_properties().clusters,
                          problem.stream};
  return cuda::launch(function, shape, static_cast<const void*>(&params));
}

}  // namespace cutlass_ext::cuda::stream
