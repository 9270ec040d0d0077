// What a GEMM is predicted to take on a GPU, for weights that were not measured there: closed forms whose coefficients
// `pyquant table build` fits to the times of the weights that were (pyquant/tables/cost_model.py).
#pragma once

#include <cstdint>

namespace cutlass_ext {

// Of weights in 4 bits with groups along K, x in 16 bits. kDense: dequantize, then the caller's dense GEMM.
enum class ModelFamily { kStream, kWgmma, kDense };
constexpr int kModelFamilies = 3;

// A coefficient of each, in the order in which tables hold them; ns, positive.
//   kStream  for launches of up to 8, 16, 24 and 32 tokens each: the start; 1000 weights of a CTA; what a CTA's part of
//            the weight takes besides; an exchange within a cluster of 2. Then 1000 values of x where K is no multiple
//            of 8
//   kWgmma   for tiles of 32, 64, 128 and 256 tokens each: a block of 64 k of a CTA, and more for each slab of 64 rows;
//            then the start; an exchange within a cluster, and more for each token and slab; the output of a tile
//            that another one follows, and of the last, each for a token and slab; 1000 values of y where N is no
//            multiple of 8; the share that long calls take more, at lower clocks
//   kDense   the start; an SM's dequantizing of 1000 weights; a block of 64 k in a tile of 128 x 128, 128 x 256 and
//            64 x 64; the rest of a tile; splitting K; an SM's reading and writing of 1000 bytes; shares that are
//            added where N and where K is no multiple of 8, and for long calls
constexpr int kModelCoefficients[kModelFamilies] = {17, 15, 11};
constexpr int kMostModelCoefficients = 17;

struct ModelProblem {
  int64_t n, k, m;
  int64_t processors;  // SMs
};

// ns; infinity where the family does not take the problem.
double predict(ModelFamily family, const double* coefficients, const ModelProblem& problem);

}  // namespace cutlass_ext
