/* A C99 program over the installed library: wrong arguments fail with a message that names function and argument,
 * and nothing is written. */
#include <cutlass_ext/cutlass_ext.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { M = 3, N = 5, K = 64, GROUP = 32, BUFFER_BYTES = 1 << 16 };

static int failures = 0;

static void fail(const char* what, const char* message) {
  fprintf(stderr, "%s: unexpected: %s\n", what, message);
  ++failures;
}

/* The status is an error, and the message starts with the function and contains the argument. */
static void expect_error(cx_status status, const char* function, const char* argument) {
  const char* message = cx_last_error();
  if (status == CX_OK) fail(argument, "CX_OK");
  if (strncmp(message, function, strlen(function)) != 0 || !strstr(message, argument)) fail(argument, message);
}

static int all_bytes_are(const void* data, size_t bytes, unsigned char value) {
  const unsigned char* at = data;
  while (bytes-- > 0) {
    if (*at++ != value) return 0;
  }
  return 1;
}

/* The id of the first format of 4-bit signed integers, which needs nothing but codes and scales. */
static int32_t find_format(void) {
  for (int32_t id = 0; id < cx_format_count(); ++id) {
    cx_format_info info;
    if (cx_get_format(id, &info) == CX_OK && info.bits == 4 && !info.is_codebook && info.is_signed) return id;
  }
  fail("find_format", "no signed 4-bit format");
  return -1;
}

static void check_queries(void) {
  cx_format_info info;
  cx_instance_info instance;
  const int32_t expected = CX_VERSION_MAJOR * 10000 + CX_VERSION_MINOR * 100 + CX_VERSION_PATCH;
  if (cx_version() != expected) fail("cx_version", "not the header's version");
  if (!strstr(cx_build_info(), "version")) fail("cx_build_info", cx_build_info());
  expect_error(cx_get_format(-1, &info), "cx_get_format", "id");
  expect_error(cx_get_format(cx_format_count(), &info), "cx_get_format", "id");
  expect_error(cx_get_format(0, NULL), "cx_get_format", "info");
  expect_error(cx_get_instance(cx_instance_count(), &instance), "cx_get_instance", "index");
}

/* Calls cx_gemm with one wrong argument; y, filled with a sentinel, must keep it. */
static void check_gemm(cx_gemm_args args, const char* argument) {
  if (args.y) memset(args.y, 0xA5, M * N * sizeof(float));
  expect_error(cx_gemm(&args), "cx_gemm", argument);
  if (args.y && !all_bytes_are(args.y, M * N * sizeof(float), 0xA5)) fail(argument, "y was written");
}

static void check_gemm_arguments(void) {
  static float x[M * K], y[M * N];
  static unsigned char canonical_codes[N * K / 2], canonical_scales[N * K / GROUP * sizeof(float)];
  unsigned char* packed_codes = malloc(BUFFER_BYTES);
  unsigned char* packed_scales = malloc(BUFFER_BYTES);
  unsigned char* workspace = malloc(BUFFER_BYTES + 64);
  cx_weight canonical, packed, wrong;
  cx_weight_sizes sizes;
  cx_gemm_args good, args;
  size_t workspace_bytes = 0;

  memset(&canonical, 0, sizeof canonical);
  canonical.format = find_format();
  canonical.layout = CX_CANONICAL;
  canonical.scale_type = CX_SCALE_FP32;
  canonical.zero_type = CX_ZERO_NONE;
  canonical.n = N;
  canonical.k = K;
  canonical.group_size = GROUP;
  canonical.codes = canonical_codes;
  canonical.codes_bytes = sizeof canonical_codes;
  canonical.scales = canonical_scales;
  canonical.scales_bytes = sizeof canonical_scales;

  packed = canonical;
  packed.layout = CX_PACKED;
  if (cx_weight_bytes(&packed, &sizes) != CX_OK || sizes.codes_bytes > BUFFER_BYTES) {
    fail("cx_weight_bytes", cx_last_error());
    return;
  }
  packed.codes = packed_codes;
  packed.codes_bytes = sizes.codes_bytes;
  packed.scales = packed_scales;
  packed.scales_bytes = sizes.scales_bytes;

  /* cx_pack with a buffer that is too small writes neither buffer. */
  wrong = packed;
  wrong.codes_bytes -= 1;
  memset(packed_codes, 0xA5, BUFFER_BYTES);
  memset(packed_scales, 0xA5, BUFFER_BYTES);
  expect_error(cx_pack(&canonical, &wrong, CX_CPU, NULL), "cx_pack", "codes_bytes");
  if (!all_bytes_are(packed_codes, BUFFER_BYTES, 0xA5)) fail("codes_bytes", "codes were written");
  if (!all_bytes_are(packed_scales, BUFFER_BYTES, 0xA5)) fail("codes_bytes", "scales were written");
  if (cx_pack(&canonical, &packed, CX_CPU, NULL) != CX_OK) fail("cx_pack", cx_last_error());

  memset(&good, 0, sizeof good);
  good.weight = &packed;
  good.dtype = CX_FP32;
  good.m = M;
  good.x = x;
  good.ldx = K;
  good.y = y;
  good.ldy = N;
  good.device = CX_CPU;
  good.instance = -1;
  if (cx_gemm_workspace(&good, &workspace_bytes) != CX_OK || workspace_bytes > BUFFER_BYTES) {
    fail("cx_gemm_workspace", cx_last_error());
    return;
  }
  good.workspace = workspace + (64 - (size_t)workspace % 64) % 64;
  good.workspace_bytes = workspace_bytes;

  expect_error(cx_gemm(NULL), "cx_gemm", "args");
  args = good, args.weight = NULL, check_gemm(args, "weight");
  args = good, args.weight = &canonical, check_gemm(args, "layout");
  args = good, args.weight = &wrong, check_gemm(args, "codes_bytes");
  args = good, args.dtype = (cx_dtype)7, check_gemm(args, "dtype");
  args = good, args.m = -1, check_gemm(args, "m:");
  args = good, args.x = NULL, check_gemm(args, "x:");
  args = good, args.y = NULL, check_gemm(args, "y:");
  args = good, args.ldx = K - 1, check_gemm(args, "ldx");
  args = good, args.ldy = N - 1, check_gemm(args, "ldy");
  args = good, args.device = (cx_device)9, check_gemm(args, "device");
  args = good, args.instance = cx_instance_count(), check_gemm(args, "instance");
  args = good, args.threads = -1, check_gemm(args, "threads");
  if (workspace_bytes > 0) {
    args = good, args.workspace_bytes = workspace_bytes - 1, check_gemm(args, "workspace");
  }

  if (cx_gemm(&good) != CX_OK) fail("cx_gemm", cx_last_error());
  if (!all_bytes_are(y, sizeof y, 0)) fail("cx_gemm", "zero scales gave something else than zeros");
  free(packed_codes);
  free(packed_scales);
  free(workspace);
}

int main(void) {
  check_queries();
  check_gemm_arguments();
  printf("%d failures\n", failures);
  return failures != 0;
}
