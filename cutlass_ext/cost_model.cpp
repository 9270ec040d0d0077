#include "cutlass_ext/cost_model.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace cutlass_ext {
namespace {

constexpr int64_t kAlignment = 8;  // elements of 16 bits in a vector of 16 bytes
constexpr double kInfinity = std::numeric_limits<double>::infinity();

double ceil_div(double a, double b) { return std::ceil(a / b); }

// Clusters of some CTAs that run at once, one CTA an SM: as on an H200, where a cluster lies within one GPC.
double clusters_at_once(int size, int64_t processors) {
  constexpr double kOfH200[] = {132, 66, 39, 30, 22, 17, 15, 15};
  return std::max(1.0, std::floor(kOfH200[size - 1] / 132 * static_cast<double>(processors) + 0.5));
}

// The best of all shares of N and K, as the kernel's plan looks for it (kernels/cuda/stream/plan.cpp): warps of a CTA
// beside each other, each with some rows, and a power of two of them along K.
double predict_launch(const double* c, const ModelProblem& p, int tokens) {
  constexpr int kClass = 8;  // tokens
  const double* of = c + 4 * ((tokens - 1) / kClass);
  const int warps = tokens <= 16 ? 16 : 8, warp_rows = tokens <= 16 ? 16 : 32;
  double best = kInfinity;
  for (int beside = 1; beside <= warps; ++beside) {
    int along = 1;
    while (2 * along * beside <= warps) along *= 2;
    const double share = double(along * beside) / warps;  // of the warps that there could be
    for (const int cluster : {1, 2, 4}) {
      const double passes =
          ceil_div(ceil_div(double(p.n), warp_rows * beside), clusters_at_once(cluster, p.processors));
      const double weights = 64e-3 * warp_rows * beside * ceil_div(ceil_div(double(p.k), 64), cluster);
      best = std::min(best, passes * (of[2] + of[1] * weights / share) + of[3] * (cluster / 2));
    }
  }
  const double x = p.k % kAlignment == 0 ? 0 : c[16] * 1e-3 * tokens * double(p.k);
  return of[0] + best + x;
}

double predict_stream(const double* c, const ModelProblem& p) {
  constexpr int kMostTokens = 32;  // of a launch
  const int rest = static_cast<int>(p.m % kMostTokens);
  const double whole = p.m < kMostTokens ? 0 : double(p.m / kMostTokens) * predict_launch(c, p, kMostTokens);
  return whole + (rest == 0 ? 0 : predict_launch(c, p, rest));
}

// A GPU at its limit of power lowers its clocks, the more the longer it works: by `share` in the end.
double throttled(double ns, double share) {
  // ns after which half of that is reached. With 300e3 96.1% of the choices on the H200 are good ones, not 96.5%.
  constexpr double kHalf = 80e3;
  return ns * (1 + share * ns / (ns + kHalf));
}

// The best of all tiles and clusters, as the kernel's plan looks for it (kernels/cuda/wgmma/plan.cpp).
double predict_wgmma(const double* c, const ModelProblem& p) {
  constexpr struct {
    int tokens, slabs, blocks;  // slabs of a CTA at most; blocks of 64 k of a stage
  } kTiles[] = {{32, 4, 2}, {64, 4, 2}, {128, 4, 2}, {256, 2, 1}};
  if (p.k % kAlignment != 0 && p.m > 1) return kInfinity;  // TMA does not take such rows of x
  double best = kInfinity;
  for (int i = 0; i < 4; ++i) {
    const auto& tile = kTiles[i];
    const double stages = ceil_div(double(p.k), 64 * tile.blocks);
    for (int slabs = 1; slabs <= tile.slabs; ++slabs) {
      const double tiles = ceil_div(ceil_div(double(p.n), 64), slabs) * ceil_div(double(p.m), tile.tokens);
      const double block = c[2 * i] + c[2 * i + 1] * slabs, sums = tile.tokens * slabs;
      for (int cluster = 1; cluster <= 8 && cluster <= stages; ++cluster) {
        const double passes = ceil_div(tiles, clusters_at_once(cluster, p.processors));
        const double exchange = cluster > 1 ? c[9] + c[10] * sums * (1 + 0.7 * (cluster - 2)) : 0;
        const double main_loop = ceil_div(stages, cluster) * tile.blocks * block;
        best = std::min(best, passes * (main_loop + exchange) + (passes - 1) * c[11] * sums + c[12] * sums);
      }
    }
  }
  const double y = p.n % kAlignment == 0 ? 0 : c[13] * 1e-3 * double(p.m) * double(p.n);
  return c[8] + throttled(best, c[14]) + y;
}

double predict_dense(const double* c, const ModelProblem& p) {
  constexpr struct {
    int rows, tokens, kind;
  } kTiles[] = {{128, 128, 0}, {128, 256, 1}, {256, 128, 1}, {64, 64, 2}};
  const double n = double(p.n), k = double(p.k), m = double(p.m);
  const double sms = double(p.processors);  // memory is taken to be as fast as there are SMs
  double gemm = kInfinity;
  for (const auto& tile : kTiles) {
    const double tiles = ceil_div(n, tile.rows) * ceil_div(m, tile.tokens);
    for (const int split : {1, 2, 3, 4, 6, 8}) {
      const double passes = ceil_div(tiles * split, sms);
      const double main_loop = ceil_div(ceil_div(k, 64), split) * c[2 + tile.kind];
      const double exchange = split > 1 ? c[6] * (1 + 1e-7 * m * n * split) : 0;
      gemm = std::min(gemm, passes * (main_loop + c[5]) + exchange);
    }
  }
  gemm = std::max(gemm, c[7] * 2e-3 * (n * k + m * k + m * n) / sms);
  // Dense libraries' kernels for rows that are not aligned; 64 tokens and more feel all of it.
  const double felt = p.m == 1 ? 0 : std::min(1.0, m / 64);
  if (p.n % kAlignment != 0) gemm *= 1 + c[8] * felt;
  if (p.k % kAlignment != 0) gemm *= 1 + c[9] * felt;
  return c[0] + c[1] * 1e-3 * n * k / sms + throttled(gemm, c[10]);
}

}  // namespace

double predict(ModelFamily family, const double* coefficients, const ModelProblem& problem) {
  switch (family) {
    case ModelFamily::kStream:
      return predict_stream(coefficients, problem);
    case ModelFamily::kWgmma:
      return predict_wgmma(coefficients, problem);
    case ModelFamily::kDense:
      break;
  }
  return predict_dense(coefficients, problem);
}

}  // namespace cutlass_ext
