// The nearest entry of a codebook by binary search over the boundaries between its sorted entries.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/problem.hpp"

namespace cutlass_ext::cuda {

// Boundaries in the order of a breadth-first walk: node i has the children 2i and 2i + 1; the root is 1. Walking down
// counts the boundaries below x, as torch.bucketize does.
template <int kBits>
struct SearchTree {
  static constexpr int kLevels = 1 << kBits;
  float nodes[kLevels];
  uint32_t codes[kLevels];  // of the sorted entries
  bool sorted;              // codes[i] == i

  // The boundaries of pyquant.quantize._nearest.
  static SearchTree of(const float* codebook, bool ties_to_even) {
    SearchTree tree{};
    int order[kLevels];
    std::iota(order, order + kLevels, 0);
    std::stable_sort(order, order + kLevels, [&](int a, int b) { return codebook[a] < codebook[b]; });
    tree.sorted = std::is_sorted(order, order + kLevels);
    for (int i = 0; i < kLevels; ++i) tree.codes[i] = static_cast<uint32_t>(order[i]);
    for (int i = 0; i + 1 < kLevels; ++i) {
      float middle = static_cast<float>((double{codebook[order[i + 1]]} + double{codebook[order[i]]}) / 2);
      // A tie goes to the lower entry; where the upper one has the even code, the boundary moves down.
      if (ties_to_even && order[i + 1] % 2 == 0) middle = std::nextafterf(middle, -INFINITY);
      tree.nodes[node_of(i)] = middle;
    }
    return tree;
  }

  // The node of the i-th boundary: 2^level - 1 boundaries stand above a level, every second one of the rest in it.
  static constexpr int node_of(int i) {
    int level = kBits - 1;
    for (; i % 2 == 1; i /= 2) --level;
    return (1 << level) + i / 2;
  }
};

// A tree in shared memory; its two upper levels are taken from constant memory. Every node has a bank of its own, so
// that lanes may look up different ones.
template <int kBits>
struct SearchTable {
  float nodes[1 << kBits];
  uint32_t codes[1 << kBits];

  // Threads 0 .. 31 of a block; no barrier.
  __device__ void fill(const SearchTree<kBits>& tree) {
    const int i = threadIdx.x;
    if (i < 1 << kBits) nodes[i] = tree.nodes[i], codes[i] = tree.codes[i];
  }
};

template <int kBits>
__device__ __forceinline__ uint32_t nearest(const SearchTree<kBits>& tree, const SearchTable<kBits>& table, float x) {
  // Nodes as offsets in bytes: what a load needs.
  constexpr int kNode = sizeof(float);
  const auto* nodes = reinterpret_cast<const char*>(table.nodes);
  const bool upper = tree.nodes[1] < x;
  int offset = upper ? 3 * kNode : 2 * kNode;
  offset = 2 * offset + ((upper ? tree.nodes[3] : tree.nodes[2]) < x ? kNode : 0);
#pragma unroll
  for (int level = 2; level < kBits; ++level) {
    offset = 2 * offset + (*reinterpret_cast<const float*>(nodes + offset) < x ? kNode : 0);
  }
  const int rank = offset / kNode - (1 << kBits);
  return tree.sorted ? static_cast<uint32_t>(rank) : table.codes[rank];
}

}  // namespace cutlass_ext::cuda
