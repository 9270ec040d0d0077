// What a launch of the stream kernel gets: the problem in kernel terms, and the plan.
#pragma once

#include <cstdint>

namespace cutlass_ext::cuda::stream {

constexpr int kMaxWarps = 16;
constexpr int kThreadsPerWarp = 32;
constexpr int kCodebookSize = 16;

// Shared addresses in a plan count from 0 of the CTA's window; dynamic shared memory starts at kSharedBase or below.
// The pair table must lie on a multiple of 256, and its address is an immediate operand.
constexpr uint32_t kSharedBase = 1024;
constexpr uint32_t kPairTableBytes = 256 * 256;  // 256 pairs of codes, a copy for each of 32 banks, every 256 bytes

constexpr float kIntegerZero = 8388608;  // integer zero points are read as 2^23 + z, exactly

// Beside these a kernel reads its launch: blockIdx = (CTA of the cluster, cluster), threadIdx = (lane, row warp, k
// warp).
//
// In order of first use: constant memory is cold when a kernel starts, and a line of it (64 bytes) costs its first
// reader some hundred ns. The first line has room for 48.
struct Params {
  // The copies of codes and scales.
  const uint8_t* codes;
  const uint8_t* scales;
  int32_t units;  // row ranges of a warp in the weight
  int32_t part_blocks,
      part_rest;  // k blocks of a part (a warp of a CTA of a cluster); the first part_rest have one more
  uint32_t slab_code_bytes, slab_scale_bytes;
  int32_t group_shift;  // log2(k blocks of a group); 0 for groups below a block, 31 for one group
  uint32_t group_scale_bytes, group_zero_bytes;  // of the groups in a block, 64 rows
  const uint8_t* zeros;                          // nullptr: none
  uint32_t slab_zero_bytes;
  // x.
  int32_t m, k;
  const void* x;
  uint32_t ldx;
  // In shared memory: tokens x_pitch apart, blocks x_step. Resident: the CTA's part of K, for all tiles. Otherwise a
  // warp has as many blocks as stages.
  uint32_t x_at, x_pitch, x_step;
  bool x_resident;
  bool x_vector;  // rows of x start on 16 bytes and K % 8 == 0
  bool programmatic_launch;
  // Later passes, sums.
  int32_t tiles;
  uint32_t partial_at, partial_bytes;  // a warp's sums of a tile
  uint32_t exchange_at, exchange_bytes;
  uint32_t barriers;  // of the exchange
  // y.
  int32_t n;
  void* y;
  int64_t ldy;
  const void* bias;
  const float* tensor_scale;
  bool y_pairs;  // y may be written two values at a time
  // Integers: `start` is sum(x) times these, pairs of x's type for the rows g and g + 8; accumulators start from it.
  // With zero points it is minus sum(x), accumulators start from start * start_offset, and start * (zero + zero_offset)
  // is added in the end: integers have all their offset there, where it is exact; others, which have a fraction, none.
  uint32_t start_low, start_high;
  float start_offset_low, start_offset_high;
  float zero_offset_low, zero_offset_high;
  // Other scales.
  uint32_t resolved_at;  // scales and zeros as fp32, per warp
  uint32_t nested_map_at;
  int32_t scale_bytes;  // of one scale
  int32_t zero_bytes;   // of one zero, 0: none
  int32_t scale_type, zero_type;
  const float* nested_map;
  const float* nested_absmax;
  const float* nested_offset;
  int32_t groups;  // of a row, unpadded: nested absmax values are numbered by it
  // Codebooks.
  const float* codebook_data;
  float codebook_factor;          // where codebook_data is nullptr: codebook_factor.hpp
  float codebook[kCodebookSize];  // the same
};

}  // namespace cutlass_ext::cuda::stream
