// What a launch of the transposed kernel gets: the problem in kernel terms, and the plan.
#pragma once

#include <cstdint>

namespace cutlass_ext::cuda::transposed {

constexpr int kCodebookSize = 16;
// Shared addresses in a plan count from 0 of the CTA's window; dynamic shared memory starts at kSharedBase or below.
// The pair table lies there, because its address is an immediate operand.
constexpr uint32_t kSharedBase = 1024;
constexpr uint32_t kPairTableBytes = 256 * 256;  // 256 pairs of codes, a copy for each of 32 banks, every 256 bytes

// Beside these a kernel reads its launch: blockIdx.x = tile * cluster + rank, threadIdx.x = 32 * (row * columns +
// column)
// + lane.
struct Params {
  // The copies of codes, scales and zeros. A slab is 64 rows, a column the 64 k of a block.
  const uint8_t* codes;
  const uint8_t* scales;
  const uint8_t* zeros;           // nullptr: none
  int32_t cluster;                // CTAs that own a tile, each a part of N
  int32_t columns_log;            // log2 of the columns of a tile: warps side by side
  int32_t k_blocks;               // columns of the weight
  int32_t part_slabs, part_rest;  // slabs of a part (a row of warps of a CTA); the first part_rest have one more
  int64_t slab_code_bytes, slab_scale_bytes, slab_zero_bytes;
  uint32_t group_scale_bytes, group_zero_bytes;  // of the groups in a block
  // A stage of a warp's ring: codes, scales, zeros, resolved scales, x.
  uint32_t ring_at, stage_bytes;
  uint32_t scales_at, zeros_at, resolved_at, x_at;
  uint32_t nested_map_at;
  bool programmatic_launch;
  // x [M, N].
  bool x_vector;  // rows of x start on 16 bytes and N % 8 == 0
  int32_t m, n;
  const void* x;
  int64_t ldx;
  // Scales, as ScaleResolver reads them. Its chunk is a block.
  uint32_t resolved_bytes;  // of a kind of resolved values
  bool has_rest;            // floating-point zeros of another type than x's
  int32_t groups_in_chunk;  // 1, 2, 4
  int32_t group_steps;      // k16 steps of a group, at most 4
  int32_t group_shift;      // log2(blocks of a group); 31 for one group
  int32_t scale_type, zero_type;
  int32_t bias_of_codes;  // integers: value = code - bias_of_codes - zero
  int32_t groups;         // of a row, unpadded: nested absmax values are numbered by it
  const float* nested_map;
  const float* nested_absmax;
  const float* nested_offset;
  // y [M, K].
  int32_t k;
  void* y;
  int64_t ldy;
  const void* bias;
  const float* tensor_scale;
  bool y_pairs;  // y may be written two values at a time
  // Codebooks.
  const float* codebook_data;     // a weight's own, or nullptr
  float codebook[kCodebookSize];  // the format's
};

}  // namespace cutlass_ext::cuda::transposed
