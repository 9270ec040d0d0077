// The packed weight layout, stated once: plain constexpr C++17 without CUDA headers, read by the packer,
// the CPU kernels and the CUDA kernels.
//
// A weight is W[N, K] (N out_features, K in_features), b bits a code.
//
//   atom   16 (n) x 64 (k): the A fragments of four k16 steps of mma.sync.m16n8k16, which is also one warp's
//          share of wgmma.m64nTk16 with A in registers. Lane l = 4g + t holds, for each k16 step,
//          eight codes v = 0..7 in the order of the registers a0..a3 (two codes each):
//              v    row in the atom    k in the step
//             0,1   g                  2t, 2t + 1
//             2,3   g + 8              2t, 2t + 1
//             4,5   g                  2t + 8, 2t + 9
//             6,7   g + 8              2t + 8, 2t + 9
//   block  64 x 64 = 4 atoms, one behind the other.
//   slab   64 rows: its blocks are consecutive along K, so a K range of a slab is one flat run of bytes.
//   weight slabs one behind the other; N and K are padded to 64 with code 0.
//
// k stays in natural order: wgmma reads x through shared memory in x's own order, and the inner box of a TMA
// load is at least 16 bytes, so an order that gives a lane 8 consecutive k would need a pass over x.
//
// Codes of 3 and 5 bits are split into planes of power-of-two width, low bits first: 3 = 2 + 1, 5 = 4 + 1.
// Inside an atom the planes stand one behind the other. A lane's 32 codes in a plane of p bits are 4p bytes, read
// in pieces of at most 16 (8-bit codes: two pieces); a piece's 32 lanes are consecutive, so a warp's load is
// coalesced and free of bank conflicts.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cutlass_ext::layout {

// Functions have internal linkage (static): the CPU kernels are compiled once per instruction set, and a shared
// inline copy that holds AVX-512 instructions could be linked into the portable path.

constexpr int kAtomRows = 16;
constexpr int kBlockRows = 64;  // rows of a slab
constexpr int kBlockK = 64;
constexpr int kAtomsPerBlock = kBlockRows / kAtomRows;
constexpr int kLanes = 32;
constexpr int kStepK = 16;                // k of one MMA
constexpr int kSteps = kBlockK / kStepK;  // MMAs along k in a block
constexpr int kCodesPerStep = 8;          // of a lane
constexpr int kCodesPerLane = kSteps * kCodesPerStep;
constexpr int kMaxPieceBytes = 16;  // the widest vector load of a lane

static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Order of the codes inside a 32-bit word.
enum class CodeOrder {
  // Consecutive codes in consecutive bits. A pair (v, v + 1) is one bit field of 2p bits: the index of a
  // two-value lookup. For codebooks.
  kPairs,
  // The pairs' first codes in the low half-word, their second codes in the high one, so that one mask leaves a
  // pair in two 16-bit lanes (p = 4: w & 0x000F000F). For integers.
  kHalves,
};

struct Planes {
  int count;
  int bits[2];
};

// The planes of a b-bit code, low bits first.
static constexpr Planes planes_of(int bits) {
  return bits == 3 ? Planes{2, {2, 1}} : bits == 5 ? Planes{2, {4, 1}} : Planes{1, {bits, 0}};
}

static constexpr int atom_bytes(int bits) { return kAtomRows * kBlockK * bits / 8; }
static constexpr int block_bytes(int bits) { return kAtomsPerBlock * atom_bytes(bits); }

static constexpr int64_t slabs(int64_t n) { return ceil_div(n, kBlockRows); }
static constexpr int64_t blocks_along_k(int64_t k) { return ceil_div(k, kBlockK); }
static constexpr int64_t packed_code_bytes(int64_t n, int64_t k, int bits) {
  return slabs(n) * blocks_along_k(k) * block_bytes(bits);
}

// A position inside an atom, as the tensor cores see it.
struct Fragment {
  int lane;   // 0..31
  int step;   // k16 step, 0..3
  int value;  // 0..7
};

static constexpr Fragment fragment_of(int row_in_atom, int k_in_block) {
  const int k = k_in_block % kStepK;
  return {4 * (row_in_atom % 8) + (k % 8) / 2, k_in_block / kStepK, k % 2 + 2 * (row_in_atom / 8) + 4 * (k / 8)};
}

static constexpr int row_of(Fragment f) { return f.lane / 4 + 8 * ((f.value / 2) % 2); }
static constexpr int k_of(Fragment f) { return f.step * kStepK + 2 * (f.lane % 4) + f.value % 2 + 8 * (f.value / 4); }

// Where one plane of one code stands: a byte of the atom and the code's lowest bit in it.
struct BitAddress {
  int byte;
  int shift;
};

static constexpr BitAddress plane_address(Fragment f, int bits, int plane, CodeOrder order) {
  const Planes planes = planes_of(bits);
  const int p = planes.bits[plane];
  const int plane_base = plane == 0 ? 0 : kLanes * kCodesPerLane * planes.bits[0] / 8;
  const int index = f.step * kCodesPerStep + f.value;  // of the lane's 32 codes
  const int per_word = 32 / p;
  const int pair = index % per_word / 2;
  const int bit_in_word = order == CodeOrder::kPairs ? p * (index % per_word) : p * pair + 16 * (index % 2);
  const int byte_in_lane = 4 * (index / per_word) + bit_in_word / 8;
  const int piece_bytes = 4 * p < kMaxPieceBytes ? 4 * p : kMaxPieceBytes;
  const int piece = byte_in_lane / piece_bytes;
  return {plane_base + (piece * kLanes + f.lane) * piece_bytes + byte_in_lane % piece_bytes, bit_in_word % 8};
}

// Offset of an atom's first byte in the packed codes.
static constexpr int64_t atom_offset(int64_t n, int64_t k, int64_t weight_k, int bits) {
  const int64_t block = n / kBlockRows * blocks_along_k(weight_k) + k / kBlockK;
  return block * block_bytes(bits) + n % kBlockRows / kAtomRows * atom_bytes(bits);
}

// Scales (and zeros) are packed as [slab][group][64], the rows of a slab ordered so that a lane g of the MMA has
// the eight rows g, g + 8, .., g + 56 it works on side by side: one 16-byte load of 16-bit scales.
static constexpr int scale_position(int row_in_slab) { return row_in_slab % 8 * 8 + row_in_slab / 8; }
static constexpr int scale_row(int position) { return position % 8 * 8 + position / 8; }

// Groups of a slab. Groups shorter than K cover the padded K, so that a kernel may read them for every block.
static constexpr int64_t packed_groups(int64_t k, int64_t group_size) {
  return group_size >= k ? 1 : ceil_div(blocks_along_k(k) * kBlockK, group_size);
}
static constexpr int64_t packed_scale_count(int64_t n, int64_t k, int64_t group_size) {
  return slabs(n) * packed_groups(k, group_size) * kBlockRows;
}
static constexpr int64_t packed_scale_index(int64_t n, int64_t group, int64_t k, int64_t group_size) {
  return (n / kBlockRows * packed_groups(k, group_size) + group) * kBlockRows + scale_position(n % kBlockRows);
}

// Blocks of a format with flat blocks cross row ends when K is no multiple of the group size. Their scales stay in
// flat order, [ceil(N * K / group_size)], canonical and packed alike.
static constexpr bool scales_are_flat(bool flat_blocks, int64_t k, int64_t group_size) {
  return flat_blocks && k % group_size != 0;
}

}  // namespace cutlass_ext::layout
