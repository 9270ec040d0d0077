#include "kernels/cuda/wgmma/launch.cuh"

namespace cutlass_ext {
extern const Instance cuda_wgmma_int4_bf16;
const Instance cuda_wgmma_int4_bf16 =
    cuda::wgmma::make_instance<cuda::wgmma::IntegerCodes, __nv_bfloat16>("cuda_wgmma_int4_bf16");
}  // namespace cutlass_ext
