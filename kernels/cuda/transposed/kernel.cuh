// The transposed kernel: y[M, K] = x[M, N] W[N, K] (+ bias) for few tokens and 4-bit W, on the packed layout of the
// other families. The GEMM is y^T = W^T x^T: W^T is the A operand of the MMA, tokens its n.
//
// Split    A cluster owns a tile: one, two or four columns, the 64 k of a block. Its CTAs split N by slabs of 64 rows,
//          and so do the rows of warps of a CTA; a row has a warp for each column. So every weight is read by one warp,
//          once, and only sums travel: between the warps of a CTA through shared memory, between the CTAs of a cluster
//          by reads of each other's. Every sum is added in one fixed order.
// Ring     A warp has a ring of stages of its own and waits for nobody. A stage is a block: codes, scales, zero points,
//          and the x of its 64 n. Weights are requested first of all, before the grid dependency.
// Scales   They vary along the contraction, so weights are scaled before the MMA. The warp makes pairs of x's type of
//          its stage's scales, whatever their type: wgmma/scales.cuh.
// Decode   Codes are transposed by movmatrix, eight at once, then decoded: codes.cuh.
#pragma once

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/transposed/codes.cuh"
#include "kernels/cuda/transposed/plan.hpp"
#include "kernels/cuda/wgmma/scales.cuh"
#include "kernels/layout.hpp"

namespace cutlass_ext::cuda::transposed {

template <class Codes_, int kTokens_>
struct Config {
  using Codes = Codes_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kTokenTiles = kTokens / 8;  // n of an MMA
  // What registers allow without spills; integers have four kinds of resolved values in fine kernels.
  static constexpr int kWarps = kTokens > 32 ? 8 : kTokens > 16 && Codes::kFine && !Codes::kTable ? 12 : 16;
};

template <class C>
class Kernel {
 public:
  using Codes = typename C::Codes;
  using T = typename Codes::T;

  __device__ __forceinline__ Kernel(const Params& params, char* shared) : p(params) {
    const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    if (Codes::kPairTable && (base & 0xFFFFFFu) > kSharedBase) __trap();
    window = base & 0xFF000000u;  // a CTA of a cluster sees its own shared memory from rank << 24 on
    lane = threadIdx.x % layout::kLanes;
    warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / layout::kLanes, 0);
    columns = 1 << p.columns_log;
    tile = blockIdx.x / p.cluster;
    rank = blockIdx.x - tile * p.cluster;
    // Warps behind the weight's last column do that one again; nobody stores it.
    column = min((tile << p.columns_log) + (warp & (columns - 1)), p.k_blocks - 1);
    const int part = rank * rows() + (warp >> p.columns_log);
    first_slab = part * p.part_slabs + min(part, p.part_rest);
    slabs = p.part_slabs + (part < p.part_rest ? 1 : 0);
    ring = window + p.ring_at + warp * (kStages * p.stage_bytes);
  }

  __device__ __forceinline__ void run() {
    launch_dependents();
    start_fill();
#pragma unroll 1
    for (int i = 0; i < kStages; ++i) {
      request_weights(ring + i * p.stage_bytes, i);
      if (!p.programmatic_launch) request_x<true>(ring + i * p.stage_bytes, i);
      copy_async_commit();
    }
    const typename Codes::Table table = load_table();
    if (p.scale_type == int(ScaleType::kNested)) {
      for (int i = threadIdx.x; i < kNestedMapSize; i += blockDim.x) {
        store_shared_float(window + p.nested_map_at + i * 4, __ldg(p.nested_map + i));
      }
      load_second_level(0);
    }
    wait_for_previous_kernel();
    if (p.programmatic_launch) {
#pragma unroll 1
      for (int i = 0; i < kStages; ++i) request_x<false>(ring + i * p.stage_bytes, i);
    }
    __syncthreads();  // the table, the map of nested scales
    multiply(table);
    copy_async_wait<0>();  // of no more stages; sums take their place
    __syncwarp();
    store_sums();
    __syncthreads();
    if (p.cluster == 1) {
      finish_in_cta();
    } else {
      finish_in_cluster();
    }
  }

 private:
  using NestedResolver = wgmma::ScaleResolver<Codes, ScaleType::kNested, Params>;

  const Params& p;
  uint32_t window, ring;
  int lane, warp, columns, column, tile, rank;
  int first_slab, slabs;  // of this warp
  // This lane's 16 bytes of each piece of the slab to request next.
  const uint8_t* fill_codes;
  const uint8_t* fill_scales;
  const uint8_t* fill_zeros;
  typename NestedResolver::SecondLevel second_level;  // of the slab to multiply next
  float sums[layout::kSteps][C::kTokenTiles][4];

  __device__ __forceinline__ int rows() const { return blockDim.x / layout::kLanes >> p.columns_log; }

  // ---- the ring

  __device__ __forceinline__ void start_fill() {
    const int64_t chunk = column >> p.group_shift;
    fill_codes = p.codes + first_slab * p.slab_code_bytes + int64_t{column} * layout::block_bytes(4) + lane * 16;
    fill_scales = p.scales + first_slab * p.slab_scale_bytes + chunk * p.group_scale_bytes + lane * 16;
    fill_zeros = p.zeros + first_slab * p.slab_zero_bytes + chunk * p.group_zero_bytes + lane * 16;
  }

  // Of the warp's slab `index`, if there is one; called for one after the other.
  __device__ __forceinline__ void request_weights(uint32_t stage, int index) {
    if (index >= slabs) return;
    constexpr int kRound = layout::kLanes * 16;
#pragma unroll
    for (int i = 0; i < layout::block_bytes(4); i += kRound) copy_async<16>(stage + lane * 16 + i, fill_codes + i);
    request_groups(stage + p.scales_at, fill_scales, p.group_scale_bytes);
    request_groups(stage + p.zeros_at, fill_zeros, p.group_zero_bytes);
    fill_codes += p.slab_code_bytes;
    fill_scales += p.slab_scale_bytes;
    fill_zeros += p.slab_zero_bytes;
  }

  __device__ __forceinline__ void request_groups(uint32_t to, const uint8_t* from, uint32_t bytes) const {
    for (uint32_t i = lane * 16; i < bytes; i += layout::kLanes * 16) copy_async<16>(to + i, from + i - lane * 16);
  }

  // The 64 n of the warp's slab `index`, of all tokens; zeros behind N. Eight lanes have a token. Where it must not be
  // read before the kernel's predecessor has ended it comes through registers: a wait for its asynchronous copies would
  // be one for all the weights that were requested before.
  template <bool kAsync>
  __device__ __forceinline__ void request_x(uint32_t stage, int index) const {
    if (index >= slabs) return;
    constexpr int kAtOnce = layout::kLanes / 8;
    const int first = lane >> 3;
    const int n = (first_slab + index) * layout::kBlockRows + (lane & 7) * 8;
    const T* from = static_cast<const T*>(p.x) + first * p.ldx + n;
    uint32_t to = stage + p.x_at + first * kXPitch + (lane & 7) * 16;
    if (!p.x_vector) {
#pragma unroll 1
      for (int token = first; token < p.m; token += kAtOnce, from += kAtOnce * p.ldx, to += kAtOnce * kXPitch) {
#pragma unroll 1
        for (int i = 0; i < 8; ++i) {
          store_shared_2(to + i * 2, n + i < p.n ? reinterpret_cast<const uint16_t*>(from)[i] : 0);
        }
      }
    } else if constexpr (kAsync) {
#pragma unroll
      for (int token = 0; token < C::kTokens; token += kAtOnce, from += kAtOnce * p.ldx) {
        if (first + token < p.m) copy_async<16>(to + token * kXPitch, from, n < p.n);
      }
    } else {
      uint4 v[C::kTokens / kAtOnce];
#pragma unroll
      for (int i = 0; i < C::kTokens / kAtOnce; ++i, from += kAtOnce * p.ldx) {
        v[i] = make_uint4(0, 0, 0, 0);
        if (first + i * kAtOnce < p.m && n < p.n) v[i] = *reinterpret_cast<const uint4*>(from);
      }
#pragma unroll
      for (int i = 0; i < C::kTokens / kAtOnce; ++i) {
        if (first + i * kAtOnce < p.m) store_shared_16(to + i * kAtOnce * kXPitch, v[i]);
      }
    }
  }

  // ---- codebooks

  __device__ __forceinline__ uint32_t codebook_value(int code) const {
    const float value = p.codebook_data != nullptr ? __ldg(p.codebook_data + code) : p.codebook[code];
    return stream::pack_pair<T>(value, 0);
  }

  __device__ __forceinline__ typename Codes::Table load_table() const {
    typename Codes::Table table;
    if constexpr (Codes::kPairTable) {
      // Two threads an entry, 64 bytes each; the order of their pieces keeps eight threads on different banks.
      for (int i = threadIdx.x; i < 512; i += blockDim.x) {
        const int entry = i >> 1;
        const uint32_t pair = codebook_value(entry & 15) | codebook_value(entry >> 4) << 16;
        const uint32_t at = window + kSharedBase + entry * 256 + (i & 1) * 64;
#pragma unroll
        for (int piece = 0; piece < 4; ++piece) {
          store_shared_16(at + ((piece + entry) & 3) * 16, make_uint4(pair, pair, pair, pair));
        }
      }
      table.lane_address = window + lane * 4;
    } else if constexpr (Codes::kTable) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t low = codebook_value(4 * i) | codebook_value(4 * i + 1) << 16;
        const uint32_t high = codebook_value(4 * i + 2) | codebook_value(4 * i + 3) << 16;
        table.low[i] = __byte_perm(low, high, 0x6420);
        table.high[i] = __byte_perm(low, high, 0x7531);
      }
    }
    return table;
  }

  // ---- scales

  __device__ __forceinline__ void load_second_level(int index) {
    const NestedResolver resolver(p, window);
    if (index < slabs && lane < shares()) {
      resolver.load_second_level((first_slab + index) * layout::kBlockRows, column, lane, second_level);
    }
  }

  __device__ __forceinline__ int shares() const { return p.groups_in_chunk * NestedResolver::kShares; }

  template <ScaleType kType>
  __device__ __forceinline__ void resolve_as(uint32_t stage) const {
    const wgmma::ScaleResolver<Codes, kType, Params> resolver(p, window);
    for (int share = lane; share < shares(); share += layout::kLanes) resolver.resolve(stage, share, {});
  }

  __device__ __forceinline__ void resolve_nested(uint32_t stage, int index) {
    const NestedResolver resolver(p, window);
    for (int share = lane; share < shares(); share += layout::kLanes) {
      auto second = second_level;
      if (share != lane) {
        resolver.load_second_level((first_slab + index) * layout::kBlockRows, column, share, second);
      }
      resolver.resolve(stage, share, second);
    }
    load_second_level(index + 1);
  }

  __device__ __forceinline__ void resolve(uint32_t stage, int index) {
    switch (ScaleType(p.scale_type)) {
      case ScaleType::kFp32:
        return resolve_as<ScaleType::kFp32>(stage);
      case ScaleType::kFp16:
        return resolve_as<ScaleType::kFp16>(stage);
      case ScaleType::kBf16:
        return resolve_as<ScaleType::kBf16>(stage);
      case ScaleType::kE4M4:
        return resolve_as<ScaleType::kE4M4>(stage);
      case ScaleType::kE4M3:
        return resolve_as<ScaleType::kE4M3>(stage);
      case ScaleType::kE8M0:
        return resolve_as<ScaleType::kE8M0>(stage);
      case ScaleType::kNested:
        return resolve_nested(stage, index);
    }
  }

  // Resolved values of one kind for the rows 2t, 2t + 1 and 2t + 8, 2t + 9 of an atom; `from`: the first row's.
  __device__ __forceinline__ static void load_rows(uint32_t from, uint32_t (&pairs)[2]) {
    constexpr uint32_t kNextRow = layout::scale_position(1) * 2;
    const uint32_t even = load_shared_4(from), odd = load_shared_4(from + kNextRow);
    pairs[0] = __byte_perm(even, odd, 0x5410);
    pairs[1] = __byte_perm(even, odd, 0x7632);
  }

  __device__ __forceinline__ void load_scale(uint32_t from, Scale& scale) const {
    load_rows(from, scale.scale);
    if constexpr (Codes::kTable) {
      load_rows(from + p.resolved_bytes, scale.scale_rest);
    } else {
      load_rows(from + p.resolved_bytes, scale.zero);
      if (Codes::kFine && p.has_rest) {
        load_rows(from + 2 * p.resolved_bytes, scale.zero_rest);
        load_rows(from + 3 * p.resolved_bytes, scale.scale_rest);
      }
    }
  }

  // ---- the main loop

  __device__ __forceinline__ void multiply(const typename Codes::Table& table) {
#pragma unroll
    for (int s = 0; s < layout::kSteps; ++s)
#pragma unroll
      for (int j = 0; j < C::kTokenTiles; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[s][j][i] = 0;
    const int matrix = lane >> 3;  // whose row the lane names for ldmatrix
    const int group_shift = 31 - __clz(p.group_steps);
    uint32_t stage = ring;
#pragma unroll 1
    for (int index = 0; index < slabs; ++index) {
      copy_async_wait<kStages - 1>();
      __syncwarp();
      resolve(stage, index);
      __syncwarp();
#pragma unroll
      for (int atom = 0; atom < layout::kAtomsPerBlock; ++atom) {
        const uint4 w = load_shared_16(stage + atom * layout::atom_bytes(4) + lane * 16);
        const uint32_t words[layout::kSteps] = {w.x, w.y, w.z, w.w};
        uint32_t b[C::kTokenTiles][2];  // x of the atom's 16 n
        load_x(stage + p.x_at, atom, matrix, b);
        Scale scale;
#pragma unroll
        for (int s = 0; s < layout::kSteps; ++s) {
          if (s == 0 || (Codes::kFine && (s & (p.group_steps - 1)) == 0)) {
            const int value = (s >> group_shift) * layout::kBlockRows + layout::scale_position(2) * (lane & 3);
            load_scale(stage + p.resolved_at + (value + layout::scale_position(atom * layout::kAtomRows)) * 2, scale);
          }
          uint32_t r[4];
          Codes::decode(transpose_codes<Codes>(words[s]), table, scale, p.has_rest, r);
          const uint32_t a[4] = {r[0], r[2], r[1], r[3]};
#pragma unroll
          for (int j = 0; j < C::kTokenTiles; ++j) stream::multiply<T>(sums[s][j], a, b[j], sums[s][j]);
        }
      }
      __syncwarp();  // all lanes have read the stage
      request_weights(stage, index + kStages);
      request_x<true>(stage, index + kStages);
      copy_async_commit();
      stage = stage == ring ? ring + p.stage_bytes : ring;
      static_assert(kStages == 2);
    }
  }

  // Tokens beyond M: the last one again, in columns that nobody reads.
  __device__ __forceinline__ void load_x(uint32_t x, int atom, int matrix, uint32_t (&b)[C::kTokenTiles][2]) const {
    const uint32_t at = x + atom * (layout::kAtomRows * 2) + (matrix & 1) * 16;
    if constexpr (C::kTokenTiles == 1) {
      const int token = min(lane & 7, p.m - 1);
      load_matrices_2(at + token * kXPitch, b[0][0], b[0][1]);
    } else {
#pragma unroll
      for (int j = 0; j < C::kTokenTiles; j += 2) {
        const int token = min((j + (matrix >> 1)) * 8 + (lane & 7), p.m - 1);
        load_matrices(at + token * kXPitch, b[j][0], b[j][1], b[j + 1][0], b[j + 1][1]);
      }
    }
  }

  // ---- sums

  // A warp's sums, [token][k], at the start of its ring.
  __device__ __forceinline__ void store_sums() const {
    const int first_token = 2 * (lane & 3);
    const uint32_t to = ring + first_token * kSumPitch + k_of_row<Codes>(lane >> 2) * 4;
#pragma unroll
    for (int j = 0; j < C::kTokenTiles; ++j)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        if (first_token + j * 8 + odd >= p.m) continue;
#pragma unroll
        for (int s = 0; s < layout::kSteps; ++s) {
          const uint32_t at = to + (j * 8 + odd) * kSumPitch + s * (layout::kStepK * 4);
          store_shared_float(at, sums[s][j][odd]);
          store_shared_float(at + kNextRowK<Codes> * 4, sums[s][j][2 + odd]);
        }
      }
  }

  // The tile's outputs are numbered token by token, two k each.
  static constexpr int kColumnPairs = layout::kBlockK / 2;

  __device__ __forceinline__ int token_of(int pair) const { return pair / kColumnPairs >> p.columns_log; }
  __device__ __forceinline__ int k_pair_of(int pair) const { return pair & (kColumnPairs * columns - 1); }

  // Where the first row's sums of a pair are.
  __device__ __forceinline__ uint32_t sums_at(int pair) const {
    const int k_pair = k_pair_of(pair);
    return window + p.ring_at + k_pair / kColumnPairs * (kStages * p.stage_bytes) + token_of(pair) * kSumPitch +
           k_pair % kColumnPairs * 8;
  }

  __device__ __forceinline__ float2 add_rows(int pair) const {
    uint32_t at = sums_at(pair);
    float2 sum{};
#pragma unroll 4
    for (int i = 0; i < rows(); ++i, at += columns * kStages * p.stage_bytes) {
      const float2 v = load_shared_float2(at);
      sum.x += v.x;
      sum.y += v.y;
    }
    return sum;
  }

  __device__ __forceinline__ void store(int pair, float2 sum) const {
    const int token = token_of(pair);
    const int k = (tile << p.columns_log) * layout::kBlockK + k_pair_of(pair) * 2;
    const float scale = Codes::kOutputFactor * (p.tensor_scale != nullptr ? __ldg(p.tensor_scale) : 1.0f);
    float v[2] = {sum.x * scale, sum.y * scale};
    T* y = static_cast<T*>(p.y) + token * p.ldy + k;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (p.bias != nullptr && k + i < p.k) v[i] += float(static_cast<const T*>(p.bias)[k + i]);
    }
    if (p.y_pairs && k + 1 < p.k) {
      *reinterpret_cast<uint32_t*>(y) = stream::pack_pair<T>(v[0], v[1]);
      return;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (k + i < p.k) y[i] = T(v[i]);
    }
  }

  __device__ __forceinline__ int pairs() const { return p.m * kColumnPairs << p.columns_log; }

  __device__ __forceinline__ void finish_in_cta() const {
    for (int pair = threadIdx.x; pair < pairs(); pair += blockDim.x) store(pair, add_rows(pair));
  }

  // The CTA's sums take the place of its first row's; then each CTA adds every cluster-th block of outputs.
  __device__ __forceinline__ void finish_in_cluster() const {
    for (int pair = threadIdx.x; pair < pairs(); pair += blockDim.x) {
      const float2 sum = add_rows(pair);
      store_shared_float2(sums_at(pair), sum);
    }
    cluster_sync();
    const int threads = blockDim.x * p.cluster;
    for (int pair = rank * blockDim.x + threadIdx.x; pair < pairs(); pair += threads) {
      float2 sum{};
      for (int source = 0; source < p.cluster; ++source) {
        const float2 v = load_float2_from_cta(sums_at(pair), source);
        sum.x += v.x;
        sum.y += v.y;
      }
      store(pair, sum);
    }
    cluster_wait_for_all();  // nobody reads this CTA's shared memory any more
  }
};

template <class C>
__global__ void __launch_bounds__(C::kWarps* layout::kLanes, 1) transposed_kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) char shared[];
  Kernel<C>(p, shared).run();
}

}  // namespace cutlass_ext::cuda::transposed
