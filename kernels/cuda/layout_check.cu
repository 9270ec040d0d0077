// Compile-time check that the fragments of kernels/layout.hpp are those of the tensor cores: the A operand of
// mma.sync.m16n8k16 and one warp's share of the register A operand of wgmma.m64nTk16, as CuTe describes them.
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/layout.hpp>

#include "kernels/layout.hpp"

namespace cutlass_ext {
namespace {

// ALayout maps (thread, value) to m + rows * k of one MMA. `warp` selects the warp of a warpgroup.
template <class ALayout>
constexpr bool matches(ALayout a, int rows, int warp) {
  for (int lane = 0; lane < layout::kLanes; ++lane) {
    for (int value = 0; value < layout::kCodesPerStep; ++value) {
      const layout::Fragment f{lane, 0, value};
      const int row = warp * layout::kAtomRows + layout::row_of(f);
      if (int(a(warp * layout::kLanes + lane, value)) != row + rows * layout::k_of(f)) return false;
      if (layout::fragment_of(layout::row_of(f), layout::k_of(f)).value != value) return false;
    }
  }
  return true;
}

using Mma = cute::MMA_Traits<cute::SM80_16x8x16_F32BF16BF16F32_TN>;
using Wgmma = cute::MMA_Traits<
    cute::SM90::GMMA::MMA_64x16x16_F32BF16BF16_RS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>>;

static_assert(matches(Mma::ALayout{}, layout::kAtomRows, 0), "layout.hpp: an atom is no A fragment of mma.m16n8k16");
static_assert(matches(Wgmma::ALayout{}, layout::kBlockRows, 0) && matches(Wgmma::ALayout{}, layout::kBlockRows, 1) &&
                  matches(Wgmma::ALayout{}, layout::kBlockRows, 2) && matches(Wgmma::ALayout{}, layout::kBlockRows, 3),
              "layout.hpp: the atoms of a block are no register A operand of wgmma.m64k16");

}  // namespace
}  // namespace cutlass_ext
