// One H200, CUDA 13.0, 2026-11-21, us in a graph of calls on cold memory (one allocation of 600 MB): 1.1 MB 1.68, 2.2
// MB 1.97, 4.4 MB 2.46, 8.7 MB 3.40, 13 MB 4.34, 17.3 MB 5.28, 34.6 MB 9.06, 60.6 MB 14.91. In torch's graphs, on
// torch's memory, 0.2 more from 2 to 17 MB (the version before this one; not known why). Others tried: 1 to 8 blocks an
// SM of 256 to 1024 threads with 4 to 16 loads (1% to 3% apart; up to 13% where the loads of one wave fall a little
// short of the size), bulk copies of 2 to 16 KB into shared memory (2% to 22% slower), prefetching 256 bytes (4%
// slower).
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/device.hpp"
#include "kernels/cuda/read_floor.hpp"

namespace cutlass_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 8;  // all threads that an SM can hold
constexpr int kLoads = 4;        // of 16 bytes, in flight in each thread
constexpr size_t kMaxVectors = size_t{1} << 31;
// The sum of random data is hardly ever this, so nothing is written; but the compiler cannot leave the loads out.
constexpr uint32_t kRare = 0x9E3779B9u;

__device__ uint4 load(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSm) read(const uint4* data, uint32_t vectors, uint32_t* scratch) {
  const uint32_t step = gridDim.x * kThreads;
  uint32_t sum = 0;
  for (uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < vectors; i += step * kLoads) {
    uint4 v[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) v[j] = i + j * step < vectors ? load(data + i + j * step) : uint4{};
#pragma unroll
    for (int j = 0; j < kLoads; ++j) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  if (sum == kRare) *scratch = sum;
}

}  // namespace

const char* read_floor(const void* data, size_t bytes, void* scratch, void* stream) {
  if (const char* error = device_error()) return error;
  const size_t vectors = bytes / sizeof(uint4);
  if (vectors == 0) return nullptr;
  if (vectors > kMaxVectors) return "bytes: expected at most 32 GiB";
  if (reinterpret_cast<uintptr_t>(data) % sizeof(uint4) != 0) return "data: expected 16-byte alignment";
  if (scratch == nullptr || reinterpret_cast<uintptr_t>(scratch) % sizeof(uint32_t) != 0) {
    return "scratch: expected 4 bytes with 4-byte alignment";
  }
  read<<<device_properties().sms * kBlocksPerSm, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const uint4*>(data), static_cast<uint32_t>(vectors), static_cast<uint32_t*>(scratch));
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cutlass_ext::cuda
