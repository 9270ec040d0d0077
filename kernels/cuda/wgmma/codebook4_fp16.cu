#include "kernels/cuda/wgmma/launch.cuh"

namespace cutlass_ext {
extern const Instance cuda_wgmma_codebook4_fp16;
const Instance cuda_wgmma_codebook4_fp16 =
    cuda::wgmma::make_instance<cuda::wgmma::CodebookCodes, __half>("cuda_wgmma_codebook4_fp16");
}  // namespace cutlass_ext
