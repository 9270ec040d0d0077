#include <cfloat>

#include "kernels/cuda/nested_absmax.hpp"
#include "kernels/cuda/search_tree.hpp"

namespace cutlass_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kSumBlocks = 256;  // each leaves a sum

// The sum over a block of threads, in a fixed order; valid in all threads.
__device__ double block_sum(double value) {
  __shared__ double sums[kWarps];
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  }
  if (threadIdx.x % kWarpSize == 0) sums[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  value = 0;
  for (int i = 0; i < kWarps; ++i) value += sums[i];
  return value;
}

__global__ void __launch_bounds__(kThreads) sum_absmax(const float* absmax, int64_t count, double* sums) {
  double sum = 0;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += int64_t{kSumBlocks} * kThreads) {
    sum += absmax[i];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// 256 absmax values a block: less their mean, over their largest, to the nearest entry of the map.
__global__ void __launch_bounds__(kThreads) quantize_absmax(const float* absmax, int64_t count, const double* sums,
                                                            const __grid_constant__ Weight w, QuantizeStatus* status) {
  static_assert(kThreads == kNestedBlock && kThreads == kNestedMapSize && kThreads == kSumBlocks);
  constexpr int kMapBits = 8;
  __shared__ float boundaries[kNestedMapSize];
  __shared__ uint32_t largest;
  const int i = threadIdx.x;
  if (i == 0) largest = 0;
  if (i + 1 < kNestedMapSize) {
    boundaries[SearchTree<kMapBits>::node_of(i)] = __fadd_rn(w.nested_map[i + 1], w.nested_map[i]) / 2;
  }
  const double sum = block_sum(sums[i]);  // also the barrier for what stands above
  const auto offset = static_cast<float>(sum / static_cast<double>(count));
  const int64_t at = int64_t{blockIdx.x} * kNestedBlock + i;
  const float centred = at < count ? __fsub_rn(absmax[at], offset) : 0.0f;
  atomicMax(&largest, __float_as_uint(centred) & 0x7FFFFFFFu);
  __syncthreads();
  const float second = __uint_as_float(largest);
  if (i == 0) {
    const_cast<float*>(w.nested_absmax)[blockIdx.x] = second;
    if (blockIdx.x == 0) {
      *const_cast<float*>(w.nested_offset) = offset;
      if (!(sum <= double{FLT_MAX})) status->large_sum = 1;
    }
  }
  if (at >= count) return;
  const float x = second > 0 ? __fdiv_rn(centred, second) : centred;
  int node = 1;
#pragma unroll
  for (int level = 0; level < kMapBits; ++level) node = 2 * node + (boundaries[node] < x);
  static_cast<uint8_t*>(const_cast<void*>(w.scales))[at] = static_cast<uint8_t>(node - kNestedMapSize);
}

}  // namespace

size_t nested_workspace(int64_t count) {
  return kSumBlocks * sizeof(double) + static_cast<size_t>(count) * sizeof(float);
}

float* absmax_to_nest(void* workspace) {
  return reinterpret_cast<float*>(static_cast<double*>(workspace) + kSumBlocks);
}

void nest_absmax(void* workspace, int64_t count, const Weight& w, QuantizeStatus* status, cudaStream_t stream) {
  auto* sums = static_cast<double*>(workspace);
  const float* absmax = absmax_to_nest(workspace);
  sum_absmax<<<kSumBlocks, kThreads, 0, stream>>>(absmax, count, sums);
  const auto grid = static_cast<unsigned>(layout::ceil_div(count, kNestedBlock));
  quantize_absmax<<<grid, kThreads, 0, stream>>>(absmax, count, sums, w, status);
}

}  // namespace cutlass_ext::cuda
