#include "kernels/cuda/transposed/launch.cuh"

namespace cutlass_ext {
extern const Instance cuda_transposed_int4_fp16;
const Instance cuda_transposed_int4_fp16 =
    cuda::transposed::make_instance<cuda::wgmma::IntegerCodes, __half>("cuda_transposed_int4_fp16");
}  // namespace cutlass_ext
