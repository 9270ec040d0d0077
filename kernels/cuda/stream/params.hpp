// What a launch of the stream kernel gets: the problem in kernel terms, and the plan.
#pragma once

#include <cstdint>

namespace cutlass_ext::cuda::stream {

constexpr int kMaxWarps = 16;
constexpr int kThreadsPerWarp = 32;
constexpr int kMaxCluster = 8;  // the portable limit
constexpr int kCodebookSize = 16;

// Shared addresses in a plan count from 0 of the CTA's window; dynamic shared memory starts at kSharedBase or below.
// The pair table must lie on a multiple of 256, and its address is an immediate operand.
constexpr uint32_t kSharedBase = 1024;
constexpr uint32_t kPairTableBytes = 256 * 256;  // 256 pairs of codes, a copy for each of 32 banks, every 256 bytes

// In order of first use: constant memory is cold when a kernel starts, and a line of it (64 bytes) costs its first
// reader some hundred ns.
struct Params {
  // The copies of codes and scales.
  const uint8_t* codes;
  const uint8_t* scales;
  int32_t row_warps, row_warps_inverse;  // warp / row_warps = warp * inverse >> 8
  int32_t k_warps;
  int32_t cluster, cluster_shift;  // CTAs, their log2
  // k blocks of a part (a warp of a CTA of a cluster); the first part_rest parts have one more.
  int32_t part_blocks, part_rest;
  int32_t units;  // row ranges of a warp in the weight
  uint32_t slab_code_bytes, slab_scale_bytes, slab_zero_bytes;
  int32_t group_shift;  // log2(k blocks of a group); 0 for groups below a block, 31 for one group
  uint32_t group_scale_bytes, group_zero_bytes;  // of the groups in a block, 64 rows
  uint32_t stage_bytes;
  uint32_t ring, ring_bytes;  // shared address of warp 0's ring; distance of rings
  // x.
  int32_t m, k;
  const void* x;
  int64_t ldx, x_step;  // elements between tokens, between every fourth
  // x in a stage, and its bytes; where x is shared, the address of the first column's ring of it.
  uint32_t x_at, x_stage_bytes;
  bool x_vector;  // rows of x start on 16 bytes and K % 8 == 0
  bool programmatic_launch;
  // Later passes, sums.
  int32_t clusters;  // in the grid
  int32_t tiles;
  uint32_t resolved_at;  // scales and zeros as fp32, per warp
  uint32_t nested_map_at;
  uint32_t partial_at, partial_bytes;  // a warp's sums of a tile
  uint32_t exchange_at, exchange_bytes;
  uint32_t barriers;     // of the exchange
  const uint8_t* zeros;  // nullptr: none
  int32_t scale_bytes;   // of one scale
  int32_t zero_bytes;    // of one zero, 0: none
  // Formats.
  int32_t scale_type, zero_type;
  // Integers: what accumulators start from is sum(x) times minus these, pairs of x's type for the rows g and g + 8.
  uint32_t start_low, start_high;
  float zero_low, zero_high;      // a zero point's factor of that start
  float codebook[kCodebookSize];  // where codebook_data is nullptr
  float codebook_factor;          // of the same: codebook_factor.hpp
  const float* codebook_data;
  const float* nested_map;
  const float* nested_absmax;
  const float* nested_offset;
  const float* tensor_scale;
  int32_t groups;  // of a row, unpadded: nested absmax values are numbered by it
  // y.
  int32_t n;
  void* y;
  int64_t ldy;
  const void* bias;
  bool y_pairs;  // y may be written two values at a time
};

}  // namespace cutlass_ext::cuda::stream
