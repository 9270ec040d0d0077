// What a launch of the wgmma kernel gets beside tensor maps: the problem in kernel terms, and the plan.
#pragma once

#include <cstdint>

namespace cutlass_ext::cuda::wgmma {

constexpr int kWarpgroupThreads = 128;
constexpr int kMaxStages = 24;
constexpr int kCodebookSize = 16;
// Elements of tensor maps: a box has at most 256 along a dimension, so that a block's codes are one copy.
constexpr int kPieceBytes = 8;
// Dynamic shared memory starts here in a CTA's window. The address of the pair table, its first piece, is an immediate
// operand.
constexpr uint32_t kSharedBase = 1024;
constexpr uint32_t kPairTableBytes = 256 * 256;  // 256 pairs of codes, a copy for each of 32 banks, every 256 bytes
constexpr int kSharedAlignment = 1024;           // of a stage: x lies in it in atoms of 8 rows of 128 bytes, swizzled

struct Params {
  // What a CTA does.
  int32_t cluster;                 // CTAs that own a tile, each a part of K
  int32_t slabs_per_cta;           // 64-row slabs
  int32_t k_warpgroups;            // warpgroups that share a slab, each with every k_warpgroups-th chunk
  int32_t slabs;                   // of the weight
  int32_t part_chunks, part_rest;  // of a part of K; the first part_rest parts have one more. What a stage holds
  int32_t clusters;                // in the grid
  // Who has sums of the same rows: warpgroups along K of the CTAs of a cluster. Every sources-th unit of 16 tokens is
  // the first one's, a bit each; the next one's are the next bits.
  int32_t sources;
  uint32_t units_of_first_source;
  int32_t row_tiles, token_tiles;  // of a cluster
  int32_t tile_tokens;             // of M in a tile, at most the kernel's
  // The ring: a stage holds a chunk, one or two 64-k blocks, of x, codes, scales and zeros, in this order, then
  // resolved scales.
  int32_t stages;
  uint32_t stage_bytes, copy_bytes;  // of a stage; of what is copied into it
  uint32_t codes_at, scales_at, zeros_at;
  uint32_t resolved_at, resolved_bytes;           // scales.cuh: behind what is copied; 64-row slabs' groups of a kind
  bool has_rest;                                  // floating-point zeros of another type than x's
  int32_t groups_in_chunk;                        // 1, 2, 4, 8
  int32_t group_steps;                            // k16 steps of a group, at most those of a chunk
  int32_t group_shift;                            // log2(chunks of a group); 31 for one group
  uint32_t group_scale_bytes, group_zero_bytes;   // of the groups in a chunk, 64 rows
  int32_t group_scale_pieces, group_zero_pieces;  // the same in elements of the copies
  uint32_t ring_at;
  // Shared memory behind the ring.
  uint32_t output_at, codebook_at, nested_map_at, barriers_at;
  // Formats.
  int32_t scale_type, zero_type;
  int32_t scale_bytes, zero_bytes;  // of one; 0: none
  int32_t bias_of_codes;            // integers: value = code - bias_of_codes - zero
  float codebook[kCodebookSize];    // where codebook_data is nullptr
  const float* codebook_data;
  const float* nested_map;
  const float* nested_absmax;
  const float* nested_offset;
  const float* tensor_scale;
  int32_t groups;  // of a row, unpadded: nested absmax values are numbered by it
  // The problem.
  int32_t m, n;
  bool programmatic_launch;
  bool y_vector;  // rows of y start on 16 bytes and N % 8 == 0
  void* y;
  int64_t ldy;
  const void* bias;
};

}  // namespace cutlass_ext::cuda::wgmma
