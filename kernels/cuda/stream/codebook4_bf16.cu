#include "kernels/cuda/stream/launch.cuh"

namespace cutlass_ext {
extern const Instance cuda_stream_codebook4_bf16;
const Instance cuda_stream_codebook4_bf16 =
    cuda::stream::make_instance<cuda::stream::CodebookCodes<__nv_bfloat16>, DType::kBf16>("cuda_stream_codebook4_bf16");
}  // namespace cutlass_ext
