#include "kernels/cuda/wgmma/launch.cuh"

namespace cutlass_ext {
extern const Instance cuda_wgmma_int4_fp16;
const Instance cuda_wgmma_int4_fp16 =
    cuda::wgmma::make_instance<cuda::wgmma::IntegerCodes, __half>("cuda_wgmma_int4_fp16");
}  // namespace cutlass_ext
