// What happens to the sums of a slab before they are stored: a CUTLASS epilogue visitor tree over D = W x^T,
//
//   y^T = cast(sums * (what undoes the decoding's factors * tensor scale) + bias)
//
// An activation or a residual is a node more (cutlass/epilogue/fusion; docs/extending.md).
// The collectives that usually run such trees take their accumulators from a builder's mainloop and their tiles whole;
// here a CTA of a cluster stores a share of its tokens, so kernel.cuh visits the tree itself, 16 tokens at a time.
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_compute_tma_warpspecialized.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_load_tma_warpspecialized.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>

#include "kernels/cuda/wgmma/params.hpp"
#include "kernels/layout.hpp"

namespace cutlass_ext::cuda::wgmma {

// Atom: the MMA, whose accumulators a warpgroup's threads hold: 64 rows (out_features) x kTokens. Value: of y.
template <class Atom, class Value, int kTokens>
class Epilogue {
  // The bias is a vector along the rows of D, so a column.
  using Bias = cutlass::epilogue::fusion::Sm90ColBroadcast<0, void, Value, float>;
  using Factor = cutlass::epilogue::fusion::Sm90ScalarBroadcast<float, cute::Stride<cute::_0, cute::_0, cute::_0>, 2>;
  using MultiplyAdd = cutlass::epilogue::fusion::Sm90Compute<cutlass::homogeneous_multiply_add, Value, float,
                                                             cutlass::FloatRoundStyle::round_to_nearest>;
  using Tree =
      cutlass::epilogue::fusion::Sm90TreeVisitor<MultiplyAdd, Factor, cutlass::epilogue::fusion::Sm90AccFetch, Bias>;

 public:
  __device__ __forceinline__ Epilogue(const Params& p, float factor)
      : tree_params{{{factor, 1.0f}, {nullptr, p.tensor_scale}, {}}, {}, {static_cast<const Value*>(p.bias)}, {}},
        tree(tree_params, {}) {}

  // Of `thread` of the warpgroup, for a 64-row slab of the weight. `tokens`: of the tile; nodes that read a matrix get
  // their pointer moved to the tile's first token.
  __device__ __forceinline__ auto visitor(int n, int tokens, int slab, int thread) {
    using namespace cute;
    using Tile = Shape<Int<layout::kBlockRows>, Int<kTokens>>;
    const auto mma = make_tiled_mma(MMA_Atom<Atom>{});
    const auto copy = make_tiled_copy_C(Copy_Atom<DefaultCopy, float>{}, mma);
    const auto of_d = local_tile(make_identity_tensor(make_shape(n, tokens)), Tile{}, make_coord(slab, 0));
    const auto of_thread = copy.get_slice(thread).partition_S(flat_divide(of_d, Tile{}));
    auto nothing = make_tensor<Value>(Shape<_1>{});  // there is no C
    auto callbacks = tree.template get_consumer_store_callbacks<true>(cutlass::epilogue::fusion::ConsumerStoreArgs{
        make_shape(n, tokens, Int<layout::kStepK>{}, _1{}), append(Tile{}, Int<layout::kStepK>{}),
        make_coord(slab, 0, 0, 0), mma, Tile{}, copy, make_coord_tensor(of_d.layout()),
        make_coord(n, tokens) - of_d(_0{}), make_coord_tensor(of_thread.layout()),
        make_coord(n, tokens) - of_thread(_0{}), nothing, thread});
    callbacks.begin();
    return callbacks;
  }

 private:
  typename Tree::Params tree_params;
  Tree tree;
};

}  // namespace cutlass_ext::cuda::wgmma
