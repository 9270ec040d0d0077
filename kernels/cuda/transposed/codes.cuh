// Words of codes, turned from fragments of W into fragments of W^T before they are decoded.
//
// A word holds a lane's eight codes of a 16 x 16 tile (layout.hpp). Its halves are elements of an 8 x 8 matrix of
// 16-bit values, four codes each, so that one movmatrix transposes all of them. Integers have the codes of an even k in
// one half and of the odd k in the other; codebooks have the codes of k and k + 1 in one half, of k + 8 and k + 9 in
// the other. After it a lane has in either half the codes of one n, in nibbles i:
//
//     i                 integers: k, n                   codebooks: k, n
//     0                 g, 2t (2t + 1 in the other half) e, 2t (2t + 1)
//     1                 g, 2t + 8                        e + 1, 2t
//     2                 g + 8, 2t                        e, 2t + 8
//     3                 g + 8, 2t + 8                    e + 1, 2t + 8
//
// where e is g for even g, g + 7 for odd. Which k is which row of an MMA's A operand does not matter until sums are
// stored, so these are its registers, in the order 0, 2, 1, 3 for integers. Codebooks get the same order, and pairs of
// codes in a byte, by an exchange of nibbles. Then the policies of wgmma/codes.cuh decode, with scales of two
// neighbouring n in the halves of a pair.
#pragma once

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/stream/codes.cuh"
#include "kernels/cuda/wgmma/codes.cuh"

namespace cutlass_ext::cuda::transposed {

using wgmma::Scale;
using wgmma::Scaling;

// The word of a lane of W to that of W^T, in the order that the policy decodes.
template <class Codes>
__device__ __forceinline__ uint32_t transpose_codes(uint32_t w) {
  w = transpose_matrix(w);
  if constexpr (Codes::kTable) {
    const uint32_t exchanged = (w ^ w >> 12) & 0x0000F0F0u;  // nibbles 1 and 4, 3 and 6
    w ^= exchanged ^ exchanged << 12;
  }
  return w;
}

// The k in a step of row `row` (0..7) of the transposed fragment, and how far that of row + 8 is from it.
template <class Codes>
__device__ __forceinline__ int k_of_row(int row) {
  return Codes::kTable && row % 2 != 0 ? row + 7 : row;
}
template <class Codes>
constexpr int kNextRowK = Codes::kTable ? 1 : 8;

}  // namespace cutlass_ext::cuda::transposed
