#include "kernels/cuda/transposed/launch.cuh"

namespace cutlass_ext {
extern const Instance cuda_transposed_codebook4_fp16;
const Instance cuda_transposed_codebook4_fp16 =
    cuda::transposed::make_instance<cuda::wgmma::CodebookCodes, __half>("cuda_transposed_codebook4_fp16");
}  // namespace cutlass_ext
