/* C API of cutlass_ext: y[M,N] = x[M,K] @ dequant(W[N,K])^T + bias, with W stored in 2 to 8 bits; and, for gradients
 * with respect to that x, y[M,K] = x[M,N] @ dequant(W[N,K]) + bias (CX_GEMM_TRANSPOSED).
 *
 * Rules that hold for every function:
 *  - A function that can fail returns a cx_status and, if that is not CX_OK, leaves a message for the calling thread in
 *    cx_last_error(): "function: argument: expected ..., got ...". Arguments are checked before anything is
 *    written. Nothing throws, exits or prints.
 *  - CX_CUDA: pointers are of the current device, work is queued on `stream` and not waited for, nothing synchronizes.
 *  - Buffers, stream and workspace belong to the caller. Nothing is allocated for the caller.
 *  - Functions may be called from several threads at once, on the same weight too, with one workspace per call.
 *  - Matrices are row-major; leading dimensions (ldx, ldy, ld) count elements between rows.
 */
#ifndef CUTLASS_EXT_H_
#define CUTLASS_EXT_H_

#include <stddef.h>
#include <stdint.h>

#define CX_VERSION_MAJOR 0
#define CX_VERSION_MINOR 1
#define CX_VERSION_PATCH 0

#if defined(__GNUC__)
#define CX_API __attribute__((visibility("default")))
#else
#define CX_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum cx_status {
  CX_OK = 0,
  CX_INVALID_ARGUMENT = 1, /* a wrong shape, size, type or pointer */
  CX_NOT_SUPPORTED = 2,    /* a valid request that this build or this machine has no kernel for */
  CX_WORKSPACE_TOO_SMALL = 3,
  CX_INTERNAL = 4
} cx_status;

typedef enum cx_device { CX_CPU = 0, CX_CUDA = 1 } cx_device;

/* Type of x, y, bias and of dequantized weights. */
typedef enum cx_dtype { CX_FP32 = 0, CX_FP16 = 1, CX_BF16 = 2 } cx_dtype;

/* How scales are stored. The values are those of pyquant.formats.ScaleType. */
typedef enum cx_scale_type {
  CX_SCALE_FP32 = 0,
  CX_SCALE_FP16 = 1,
  CX_SCALE_BF16 = 2,
  CX_SCALE_E4M4 = 3,  /* uint8 */
  CX_SCALE_E4M3 = 4,  /* uint8 */
  CX_SCALE_E8M0 = 5,  /* uint8 */
  CX_SCALE_NESTED = 6 /* uint8 index into nested_map */
} cx_scale_type;

typedef enum cx_zero_type {
  CX_ZERO_NONE = 0,
  CX_ZERO_INTEGER = 1, /* uint8 */
  CX_ZERO_FLOAT = 2    /* the scale's type, in code units */
} cx_zero_type;

typedef enum cx_layout {
  CX_CANONICAL = 0, /* codes [N, ceil(K * bits / 8)], lowest k in the lowest bits; scales [N, groups] or flat */
  CX_PACKED = 1     /* what the kernels read; cx_pack makes it */
} cx_layout;

/* A quantized weight: w[n,k] = decode(code[n,k]) * scale, or (code - zero) * scale.
 * In all calls but cx_pack and cx_unpack, whose outputs they are, the buffers are only read. */
typedef struct cx_weight {
  int32_t format; /* cx_format_info.id */
  cx_layout layout;
  cx_scale_type scale_type;
  cx_zero_type zero_type;
  int64_t n;          /* out_features */
  int64_t k;          /* in_features */
  int64_t group_size; /* consecutive k that share a scale */

  /* All pointers of a weight are on the device that works on it. */
  void* codes;
  void* scales;
  void* zeros; /* NULL if zero_type is CX_ZERO_NONE */
  /* The bytes behind the three pointers; checked against cx_weight_bytes. */
  size_t codes_bytes;
  size_t scales_bytes;
  size_t zeros_bytes;

  const float* codebook;      /* 2^bits values in place of the format's own; NULL for those, and for integers */
  const float* nested_map;    /* 256 values; only for CX_SCALE_NESTED */
  const float* nested_absmax; /* one per 256 flat blocks; only for CX_SCALE_NESTED */
  int64_t nested_absmax_count;
  const float* nested_offset; /* one value, added to nested scales; only for CX_SCALE_NESTED */
  const float* tensor_scale;  /* one value; only for formats with a tensor scale, whose scales it multiplies */
} cx_weight;

/* Bytes of the three buffers of a weight, in its layout. */
typedef struct cx_weight_sizes {
  size_t codes_bytes;
  size_t scales_bytes;
  size_t zeros_bytes;
  int64_t nested_absmax_count;
} cx_weight_sizes;

typedef struct cx_format_info {
  int32_t id;
  const char* name;
  int32_t bits;
  int32_t is_codebook;
  int32_t is_signed;
  int32_t flat_blocks;
  int32_t tensor_scale;
  uint32_t scale_types;  /* bit i: cx_scale_type i is allowed */
  uint32_t zero_types;   /* bit i: cx_zero_type i is allowed */
  const float* codebook; /* 2^bits values, or NULL: integers, or the weight brings its own */
} cx_format_info;

typedef struct cx_instance_info {
  const char* name; /* <device>_<family>_<isa> */
  cx_device device;
  int32_t available;     /* nonzero: this machine (CUDA: the current device) can run it */
  int32_t is_gemm;       /* nonzero: for cx_gemm; 0: for cx_dequantize */
  int32_t is_transposed; /* nonzero: for cx_gemm with CX_GEMM_TRANSPOSED, and only for that */
} cx_instance_info;

typedef struct cx_gemm_args {
  const cx_weight* weight; /* packed */
  cx_dtype dtype;          /* of x, y and bias */
  int64_t m;               /* tokens; 0 is allowed */
  const void* x;           /* [M, K]; with CX_GEMM_TRANSPOSED [M, N] */
  int64_t ldx;
  void* y; /* [M, N]; transposed [M, K] */
  int64_t ldy;
  const void* bias; /* [N] or NULL; transposed [K] */
  cx_device device;
  void* stream;    /* cudaStream_t; ignored on the CPU */
  void* workspace; /* at least cx_gemm_workspace bytes, 64-byte aligned */
  size_t workspace_bytes;
  int32_t instance; /* an index below cx_instance_count, or -1: the dispatch chooses */
  int32_t threads;  /* CPU threads; 0: as many as OpenMP gives */
  uint32_t flags;   /* CX_GEMM_... */
} cx_gemm_args;

/* CUDA, sm_90 and up: the kernel may start while the kernel before it on the stream still runs (programmatic dependent
 * launch). It reads the weight at once, so the weight must have been written before that kernel was launched; it reads
 * x and bias and writes y only after that kernel has ended. */
#define CX_GEMM_PROGRAMMATIC_LAUNCH 1u
/* For cx_select_instance: the caller has a dense GEMM, so the dispatch may answer with a dequantizing instance: for
 * cx_dequantize, followed by the caller's GEMM. */
#define CX_GEMM_DENSE_FALLBACK 2u
/* y[M,K] = x[M,N] @ dequant(W[N,K]) + bias[K], on the same packed weight. There are kernels for CX_CUDA, fp16 and bf16,
 * and weights of 4 bits whose groups do not cross row ends; for all else cx_gemm says CX_NOT_SUPPORTED, and
 * cx_select_instance with CX_GEMM_DENSE_FALLBACK names an instance that dequantizes. */
#define CX_GEMM_TRANSPOSED 4u

/* major * 10000 + minor * 100 + patch of the library. */
CX_API int32_t cx_version(void);
/* The message of the calling thread's last failure; empty if there was none. Valid until its next failure. */
CX_API const char* cx_last_error(void);
/* A JSON object that says how the library was built: version, compiler, cuda. */
CX_API const char* cx_build_info(void);

CX_API int32_t cx_format_count(void);
CX_API cx_status cx_get_format(int32_t id, cx_format_info* info);

/* Kernel instances of this build, and the one that cx_gemm would run (see CX_GEMM_DENSE_FALLBACK). */
CX_API int32_t cx_instance_count(void);
CX_API cx_status cx_get_instance(int32_t index, cx_instance_info* info);
CX_API cx_status cx_select_instance(const cx_gemm_args* args, int32_t* index);

/* The name of the CPU (its model) or of the current CUDA device, which its table carries; empty if unknown. */
CX_API cx_status cx_device_name(cx_device device, const char** name);

/* Dispatch tables. What `pyquant table build` made of measurements on this GPU is used by cx_gemm and
 * cx_select_instance; a GPU without a table gets what a cost model predicts for its number of SMs, and whatever neither
 * is about is decided by a rule over the instance list.
 *
 * Loads the table of one device from a JSON file; it takes the place of the one that the library was built with. NULL:
 * back to those of the build. A file that is no table is CX_INVALID_ARGUMENT with its line, and changes nothing. Calls
 * that run meanwhile use the old or the new table. */
CX_API cx_status cx_load_table(const char* path);

/* The names that tables may have: every instance, also those that this build lacks (CUDA). NULL: no such index. */
CX_API const char* cx_table_instance(int32_t index);

typedef struct cx_table_query {
  const char* device; /* as cx_device_name */
  const char*
      encoding; /* int4, uint4, codebook4, ...; with -nested for nested absmax, -flat for groups across row ends */
  cx_dtype dtype;
  int64_t group_size; /* K or more: one group per row */
  int64_t n, k, m;
  int32_t processors; /* SMs of a GPU without a table of its own, for a prediction; 0: none is wanted */
} cx_table_query;

typedef struct cx_table_answer {
  const char* instance;    /* maybe one that dequantizes, for callers with a dense GEMM */
  const char* gemm;        /* for the others; NULL: not measured, the rule decides */
  int64_t group_size;      /* of the nearest measured weight; 0: one group per row. Predicted: as asked */
  int64_t n, k;            /* of the nearest measured weight. Predicted: as asked */
  int64_t m_first, m_last; /* the bucket of M; m_last is INT64_MAX in the last one */
  int32_t predicted;       /* 1: by the cost model of a table; the weight was not measured */
} cx_table_answer;

/* What the tables say; CX_NOT_SUPPORTED if none has the device, encoding and dtype. */
CX_API cx_status cx_find_in_table(const cx_table_query* query, cx_table_answer* answer);

/* What a cost model predicts, for those who fit its coefficients (`pyquant table build`). */
typedef struct cx_prediction {
  int32_t family;             /* 0: stream, 1: wgmma, 2: dequantize and a dense GEMM */
  const double* coefficients; /* 17, 15 or 11: cutlass_ext/cost_model.hpp says what they are */
  int32_t processors;         /* SMs */
  int64_t count;
  const int64_t *n, *k, *m; /* [count] each */
} cx_prediction;

/* ns[count]; infinity where the family does not take the problem. */
CX_API cx_status cx_predict(const cx_prediction* query, double* ns);

/* Sizes of the weight's buffers; reads format, layout, scale_type, zero_type, n, k and group_size only. */
CX_API cx_status cx_weight_bytes(const cx_weight* weight, cx_weight_sizes* sizes);

/* Between canonical and packed, lossless both ways. `to` has the same format, types and shape as `from`, the other
 * layout, and buffers of cx_weight_bytes, all of which are written; codebook and nested parts are not touched. */
CX_API cx_status cx_pack(const cx_weight* from, cx_weight* to, cx_device device, void* stream);
CX_API cx_status cx_unpack(const cx_weight* from, cx_weight* to, cx_device device, void* stream);

/* out[N, K] = the weight, each value rounded once to dtype. The weight is packed; CX_CUDA takes a canonical one too.
 * `instance` and `threads` as in cx_gemm_args. */
CX_API cx_status cx_dequantize(const cx_weight* weight, cx_dtype dtype, void* out, int64_t ld, cx_device device,
                               void* stream, int32_t instance, int32_t threads);

/* What went wrong in cx_quantize, on the GPU: the caller reads it when the stream has got there. All 0: nothing. */
typedef struct cx_quantize_status {
  uint32_t non_finite;  /* w has NaN or Inf */
  uint32_t large_scale; /* the largest scale that its type cannot hold, as the bits of an fp32 */
  uint32_t large_sum;   /* the absmax values to be nested have a sum that fp32 cannot hold */
  uint32_t reserved;
} cx_quantize_status;

typedef struct cx_quantize_args {
  const void* w; /* [N, K] */
  cx_dtype dtype;
  int64_t ldw;             /* any; K for flat blocks that cross row ends */
  const cx_weight* weight; /* canonical. Codes, scales, zeros, nested_absmax, nested_offset and tensor_scale are
                              written; nested_map is read, and codebook too, which here is in HOST memory */
  cx_quantize_status* status;
  void* workspace; /* at least cx_quantize_workspace bytes, 64-byte aligned */
  size_t workspace_bytes;
  cx_device device; /* CX_CUDA */
  void* stream;
} cx_quantize_args;

/* Round-to-nearest quantization, equal to pyquant.quantize. Groups and codebooks as the weight says. */
CX_API cx_status cx_quantize_workspace(const cx_weight* weight, size_t* bytes);
CX_API cx_status cx_quantize(const cx_quantize_args* args);

/* For benchmarks, CUDA only: a kernel that reads `bytes` bytes at `data` and does nothing with them; no kernel on a
 * weight of that size can be faster. `scratch`: 4 bytes that may be overwritten. */
CX_API cx_status cx_read_floor(const void* data, size_t bytes, void* scratch, cx_device device, void* stream);

CX_API cx_status cx_gemm_workspace(const cx_gemm_args* args, size_t* bytes);
CX_API cx_status cx_gemm(const cx_gemm_args* args);

#ifdef __cplusplus
}
#endif

#endif /* CUTLASS_EXT_H_ */
