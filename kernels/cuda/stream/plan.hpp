// How a stream launch is cut: tiles, clusters, warps, stages, and where everything lies in shared memory. Plain C++.
#pragma once

#include "kernels/cuda/device.hpp"
#include "kernels/cuda/stream/params.hpp"
#include "kernels/problem.hpp"

namespace cutlass_ext::cuda::stream {

// What the plan must know of a compiled kernel.
struct KernelTraits {
  int token_tiles;    // n8 tiles of tokens
  int groups;         // scale groups in a 64-k block
  int rows;           // of a unit, the rows of a warp
  bool pair_table;    // codebooks
  bool resolves;      // scales go through a region of the warp
  int partial_pitch;  // bytes between tokens of a warp's sums
  int x_padding;      // bytes between the tokens of x
  uint32_t ring_at;   // shared address of the first ring
  int stage_bytes;
  int stages;  // of a ring
  int warps;   // of a CTA, at most
};

struct Compiled {
  const void* function;
  KernelTraits traits;
};

// The compiled kernels for a weight and a number of tokens.
struct Candidates {
  int count = 0;
  Compiled kernels[3];

  void add(const Compiled& kernel) { kernels[count++] = kernel; }
};

// The choice that can be made for a shape; the rest follows.
struct Split {
  int cluster;    // CTAs along K
  int row_warps;  // units of a tile
  int k_warps;    // warps of a CTA along K
};

struct Plan {
  Split split;
  int clusters;      // in the grid
  int shared_bytes;  // dynamic
};

// Fills the launch fields of `params`; false if the split does not fit the device or the problem.
bool plan_split(const GemmProblem& problem, int tokens, const KernelTraits& kernel, const DeviceProperties& device,
                const Split& split, Params* params, Plan* plan);

// The kernel and the split that the cost rule prefers; nullptr if none fits.
const Compiled* choose_plan(const GemmProblem& problem, int tokens, const Candidates& candidates,
                            const DeviceProperties& device, Params* params, Plan* plan);

}  // namespace cutlass_ext::cuda::stream
