// Inlining by force: a decode step that is not inlined spills all vectors of the loop around it.
#pragma once

#define CX_INLINE inline __attribute__((always_inline))

namespace cutlass_ext::cpu {

template <int kValue>
struct Index {
  static constexpr int value = kValue;
};

// body(Index<0>), body(Index<1>), ..: a loop whose index is a constant. `Isa` keeps instruction sets apart.
template <class Isa, int kCount, int kFirst = 0, class Body>
CX_INLINE void unroll(const Body& body) {
  if constexpr (kFirst < kCount) {
    body(Index<kFirst>{});
    unroll<Isa, kCount, kFirst + 1>(body);
  }
}

}  // namespace cutlass_ext::cpu
