// How a launch of the transposed kernel is cut: cluster, warps, and where everything lies in shared memory. Plain C++.
#pragma once

#include "kernels/cuda/device.hpp"
#include "kernels/cuda/transposed/params.hpp"
#include "kernels/problem.hpp"

namespace cutlass_ext::cuda::transposed {

constexpr int kMaxTokens = 64;                        // of a launch
constexpr int kStages = 2;                            // of a warp's ring
constexpr int kMaxColumns = 4;                        // of a tile
constexpr int kXPitch = layout::kBlockRows * 2 + 16;  // bytes between tokens of x, so that ldmatrix meets every bank
constexpr int kSumPitch = (layout::kBlockK + 4) * 4;  // of a warp's sums

// What the plan must know of a compiled kernel.
struct KernelTraits {
  int tokens;       // of its tile
  int warps;        // of a CTA, at most
  bool table;       // codebooks
  bool pair_table;  // those that are looked up in shared memory
  bool fused;       // integers without zero points
  bool fine;        // groups below a block, zero points of another type than x's
};

struct Compiled {
  const void* function;
  KernelTraits traits;
};

struct Candidates {
  int count = 0;
  Compiled kernels[12];

  void add(const Compiled& kernel) { kernels[count++] = kernel; }
};

struct Split {
  int cluster;  // CTAs along N
  int columns;  // of a tile: warps of a CTA along K
  int rows;     // warps of a CTA along N
};

struct Plan {
  Split split;
  int64_t ctas;
  int shared_bytes;  // dynamic
};

// Fills the launch fields of `params`; false if the kernel or the split does not fit the problem or the device.
bool plan_split(const GemmProblem& problem, int tokens, const KernelTraits& kernel, const DeviceProperties& device,
                const Split& split, Params* params, Plan* plan);

// The smallest kernel that takes the tokens and the split that the cost rule prefers; nullptr if none fits.
const Compiled* choose_plan(const GemmProblem& problem, int tokens, const Candidates& candidates,
                            const DeviceProperties& device, Params* params, Plan* plan);

}  // namespace cutlass_ext::cuda::transposed
