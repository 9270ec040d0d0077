// Words of codes, turned from fragments of W into fragments of W^T before they are decoded.
//
// A word holds a lane's eight codes of a 16 x 16 tile: four 8 x 8 matrices (layout.hpp), rows g of N and columns of K.
// Where the first codes of its pairs are in one half and the second ones in the other, each half is an element of an
// 8 x 8 matrix of 16-bit values, namely four codes of the same place in the four matrices, so one movmatrix transposes
// all four. After it, nibble i of the two halves is
//
//     i    k in the step    n in the atom
//     0    g                2t, 2t + 1
//     1    g                2t + 8, 2t + 9
//     2    g + 8            2t, 2t + 1
//     3    g + 8            2t + 8, 2t + 9
//
// In the order 0, 2, 1, 3 that is the A operand of an MMA whose rows are k. Nibbles 1 and 3 belong to the rows n + 8 as
// before, so that the policies of wgmma/codes.cuh decode them, with scales of two neighbouring n in the halves of a
// pair.
#pragma once

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/stream/codes.cuh"
#include "kernels/cuda/wgmma/codes.cuh"

namespace cutlass_ext::cuda::transposed {

using wgmma::Scale;
using wgmma::Scaling;

// layout::CodeOrder::kPairs to kHalves: pairs' first codes (nibbles 0, 2, 4, 6) to the low half.
__device__ __forceinline__ uint32_t pairs_to_halves(uint32_t w) {
  const uint32_t swapped = (w ^ w >> 4) & 0x00F000F0u;  // nibbles 1 and 2, 5 and 6
  return __byte_perm(w ^ swapped ^ swapped << 4, 0, 0x3120);
}

// Its inverse.
__device__ __forceinline__ uint32_t halves_to_pairs(uint32_t w) {
  w = __byte_perm(w, 0, 0x3120);
  const uint32_t swapped = (w ^ w >> 4) & 0x00F000F0u;
  return w ^ swapped ^ swapped << 4;
}

// The word of a lane of W to that of W^T; both in the order that the policy decodes.
template <class Codes>
__device__ __forceinline__ uint32_t transpose_codes(uint32_t w) {
  if constexpr (Codes::kTable) {
    return halves_to_pairs(transpose_matrix(pairs_to_halves(w)));
  } else {
    return transpose_matrix(w);
  }
}

}  // namespace cutlass_ext::cuda::transposed
