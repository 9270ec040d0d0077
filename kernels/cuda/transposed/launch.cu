#include "kernels/cuda/cluster_launch.hpp"
#include "kernels/cuda/launch.hpp"
#include "kernels/cuda/transposed/launch.cuh"

namespace cutlass_ext::cuda::transposed {

bool fits(const GemmProblem& problem) {
  const Weight& w = problem.weight;
  return w.bits == 4 && !w.flat_scales && w.groups() * w.n / kNestedBlock < INT32_MAX;
}

Params params_of(const GemmProblem& problem, int64_t first_token, int tokens) {
  const Weight& w = problem.weight;
  Params p{};
  p.codes = w.codes;
  p.scales = static_cast<const uint8_t*>(w.scales);
  p.zeros = static_cast<const uint8_t*>(w.zeros);
  p.programmatic_launch = problem.programmatic_launch;
  p.n = static_cast<int32_t>(w.n);
  p.x = static_cast<const uint16_t*>(problem.x) + first_token * problem.ldx;
  p.ldx = problem.ldx;
  p.x_vector = w.n % 8 == 0 && is_aligned(p.x, 16) && (tokens <= 1 || problem.ldx % 8 == 0);
  p.scale_type = static_cast<int32_t>(w.scale_type);
  p.zero_type = static_cast<int32_t>(w.zero_type);
  p.bias_of_codes = w.bias;
  p.groups = static_cast<int32_t>(w.groups());
  p.nested_map = w.nested_map;
  p.nested_absmax = w.nested_absmax;
  p.nested_offset = w.nested_offset;
  p.k = static_cast<int32_t>(w.k);
  p.y = static_cast<uint16_t*>(problem.y) + first_token * problem.ldy;
  p.ldy = problem.ldy;
  p.y_pairs = is_aligned(p.y, 4) && (tokens <= 1 || problem.ldy % 2 == 0);
  p.bias = problem.bias;
  p.tensor_scale = w.tensor_scale;
  if (w.is_codebook) {
    if (w.codebook_on_device) {
      p.codebook_data = w.codebook;
    } else {
      for (int i = 0; i < kCodebookSize; ++i) p.codebook[i] = w.codebook[i];
    }
  }
  return p;
}

const char* launch(const void* function, const GemmProblem& problem, const Params& params, const Plan& plan) {
  const LaunchShape shape{dim3(static_cast<unsigned>(plan.ctas)),
                          dim3(static_cast<unsigned>(plan.split.columns * plan.split.rows * layout::kLanes)),
                          plan.shared_bytes,
                          plan.split.cluster,
                          problem.programmatic_launch && device_properties().clusters,
                          problem.stream};
  return cuda::launch(function, shape, static_cast<const void*>(&params));
}

}  // namespace cutlass_ext::cuda::transposed
