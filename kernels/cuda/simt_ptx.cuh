// PTX that CUDA C++ has no names for. Compiles for sm_80 and up; what sm_90 added does nothing below it.
#pragma once

#include <cstdint>

namespace cutlass_ext::cuda {

// Copies kBytes (4, 8 or 16, both sides aligned to it) from global to shared memory, asynchronously. With
// `valid` false the bytes become zeros and `from` is not read.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid = true) {
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(from), "n"(kBytes), "r"(bytes)
                 : "memory");
  }
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the last kGroups committed groups of this thread have arrived.
template <int kGroups>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Programmatic dependent launch: the stream's next kernel may start; this one waits for the end of the one before.
// Without the launch attribute both do nothing.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// All threads of the cluster. Shared memory written before `cluster_sync` is seen after it; `cluster_wait_for_all`
// orders no memory.
__device__ __forceinline__ void cluster_wait_for_all() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.acq_rel.cluster;" ::: "memory");
  cluster_wait_for_all();
#endif
}

// A float at this CTA's shared address `from`, in the CTA `rank` of the cluster.
__device__ __forceinline__ float load_from_cta(const float* from, int rank) {
  float value = 0.0f;
#if __CUDA_ARCH__ >= 900
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(from));
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(remote) : "memory");
#endif
  return value;
}

}  // namespace cutlass_ext::cuda
