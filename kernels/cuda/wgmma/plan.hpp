// How a wgmma launch is cut: tiles, clusters, stages, and where everything lies in shared memory. Plain C++.
#pragma once

#include "kernels/cuda/device.hpp"
#include "kernels/cuda/wgmma/params.hpp"
#include "kernels/problem.hpp"

namespace cutlass_ext::cuda::wgmma {

// What the plan must know of a compiled kernel.
struct KernelTraits {
  int tokens;        // of a tile
  int blocks;        // of a chunk
  int row_tiles;     // 64-row slabs of a warpgroup
  int warpgroups;    // that multiply, at most
  int output_bytes;  // of a warpgroup's output buffer
  bool table;        // codebooks
  bool pair_table;   // in shared memory
  bool fused, fine;  // codes.cuh: Scaling
};

struct Compiled {
  const void* function;
  KernelTraits traits;
};

struct Candidates {
  int count = 0;
  Compiled kernels[16];

  void add(const Compiled& kernel) { kernels[count++] = kernel; }
};

// The choice that can be made for a shape; the rest follows.
struct Split {
  int warpgroups;    // of a CTA that multiply, along the rows
  int k_warpgroups;  // along K
  int cluster;       // CTAs that own a tile, each a part of K
};

struct Plan {
  Split split;
  int clusters;      // in the grid
  int threads;       // of a CTA
  int shared_bytes;  // dynamic
  int chunk_blocks;  // of a copy of codes
};

// Fills the launch fields of `params`; false if the split does not fit the device or the problem.
bool plan_split(const GemmProblem& problem, const KernelTraits& kernel, const DeviceProperties& device,
                const Split& split, Params* params, Plan* plan);

// The kernel and the split that the cost rule prefers; nullptr if none fits.
const Compiled* choose_plan(const GemmProblem& problem, const Candidates& candidates, const DeviceProperties& device,
                            Params* params, Plan* plan);

}  // namespace cutlass_ext::cuda::wgmma
