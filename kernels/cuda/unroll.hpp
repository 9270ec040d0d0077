// Loops whose index is a constant expression, so that what the layout says of it is computed by the compiler.
#pragma once

#include <type_traits>

namespace cutlass_ext::cuda {

// body(std::integral_constant<int, 0>{}), body(std::integral_constant<int, 1>{}), ..
template <int kCount, int kFirst = 0, class Body>
__device__ __forceinline__ void unroll(const Body& body) {
  if constexpr (kFirst < kCount) {
    body(std::integral_constant<int, kFirst>{});
    unroll<kCount, kFirst + 1>(body);
  }
}

}  // namespace cutlass_ext::cuda
