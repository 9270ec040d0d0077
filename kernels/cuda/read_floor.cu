// One H200, CUDA 13.0, 2026-11-21, us in a graph on cold memory: 1.1 MB 1.7, 4.4 MB 2.4, 8.7 MB 3.4, 13 MB 4.4,
// 34.6 MB 9.2, 60.6 MB 15.2. Tried: 1 to 8 blocks an SM of 256 to 1024 threads with 4 to 16 loads (1% to 3% apart; up
// to 13% where the loads of one wave fall a little short of the size), bulk copies of 2 to 16 KB into shared memory (1%
// to 22% slower).
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/device.hpp"
#include "kernels/cuda/read_floor.hpp"

namespace cutlass_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 4;
constexpr int kLoads = 8;  // of 16 bytes, in flight in each thread
// The sum of random data is hardly ever this, so nothing is written; but the compiler cannot leave the loads out.
constexpr uint32_t kRare = 0x9E3779B9u;

__device__ uint4 load(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// Without the second bound the compiler saves registers that nobody needs, and waits for half of the loads first.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    read(const uint4* data, size_t vectors, unsigned tail, uint32_t* scratch) {
  const size_t step = size_t{gridDim.x} * kThreads;
  uint32_t sum = 0;
  for (size_t i = size_t{blockIdx.x} * kThreads + threadIdx.x; i < vectors; i += step * kLoads) {
    uint4 v[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) v[j] = i + j * step < vectors ? load(data + i + j * step) : uint4{};
#pragma unroll
    for (int j = 0; j < kLoads; ++j) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  if (blockIdx.x == 0 && threadIdx.x < tail) sum ^= reinterpret_cast<const uint8_t*>(data + vectors)[threadIdx.x];
  if (sum == kRare) *scratch = sum;
}

}  // namespace

const char* read_floor(const void* data, size_t bytes, void* scratch, void* stream) {
  if (const char* error = device_error()) return error;
  if (bytes == 0) return nullptr;
  if (reinterpret_cast<uintptr_t>(data) % sizeof(uint4) != 0) return "data: expected 16-byte alignment";
  if (scratch == nullptr || reinterpret_cast<uintptr_t>(scratch) % sizeof(uint32_t) != 0) {
    return "scratch: expected 4 bytes with 4-byte alignment";
  }
  read<<<device_properties().sms * kBlocksPerSm, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const uint4*>(data), bytes / sizeof(uint4), static_cast<unsigned>(bytes % sizeof(uint4)),
      static_cast<uint32_t*>(scratch));
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cutlass_ext::cuda
