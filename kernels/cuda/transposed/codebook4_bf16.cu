#include "kernels/cuda/transposed/launch.cuh"

namespace cutlass_ext {
extern const Instance cuda_transposed_codebook4_bf16;
const Instance cuda_transposed_codebook4_bf16 =
    cuda::transposed::make_instance<cuda::wgmma::CodebookCodes, __nv_bfloat16>("cuda_transposed_codebook4_bf16");
}  // namespace cutlass_ext
