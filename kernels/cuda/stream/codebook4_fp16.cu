#include "kernels/cuda/stream/launch.cuh"

namespace cutlass_ext {
extern const Instance cuda_stream_codebook4_fp16;
const Instance cuda_stream_codebook4_fp16 =
    cuda::stream::make_instance<cuda::stream::CodebookCodes<__half>, DType::kFp16>("cuda_stream_codebook4_fp16");
}  // namespace cutlass_ext
