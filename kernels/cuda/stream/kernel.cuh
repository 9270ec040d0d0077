// The stream kernel: y[M, N] = x[M, K] W[N, K]^T (+ bias) for few tokens and 4-bit W, at the speed of reading W.
//
// Split    A tile is the rows of `row_warps` units; a unit is what a warp's atoms cover, 16 rows each. A cluster owns a
//          tile; its CTAs, and the k warps of each, split K. So every weight is read by one warp, once, and only sums
//          travel: between the k warps of a CTA through shared memory, between the CTAs of a cluster by asynchronous
//          stores into the shared memory of the CTA that owns the row. Every sum is added in one fixed order.
// Ring     A warp has a ring of stages of its own. A stage is a 64-k block of its unit: codes, scales, zero points.
//          Weights are requested first of all, before the grid dependency; the blocks' x after it. Up to 16 tokens x
//          is part of the stage and a warp waits for nobody. Above, the row warps of a column (one part of K) share a
//          ring of x, of which each requests some tokens.
// Decode   Weights are the A operand of the MMA, tokens its n: codes.cuh. Scales multiply the fp32 sums of a group.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm80.hpp>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/stream/codebook_factor.hpp"
#include "kernels/cuda/stream/codes.cuh"
#include "kernels/cuda/stream/params.hpp"
#include "kernels/cuda/stream/scales.cuh"
#include "kernels/layout.hpp"

namespace cutlass_ext::cuda::stream {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kHopper = true;
#else
constexpr bool kHopper = false;
#endif

constexpr int kAtomBytes = layout::atom_bytes(4);
constexpr int kBlockBytes = layout::block_bytes(4);
constexpr int kTokensPerTile = 8;  // n of an MMA
// Bytes of a token's x in a stage; 16 more than its 64 values, so that ldmatrix reads eight rows from different banks.
constexpr int kXPitch = layout::kBlockK * 2 + 16;

// Bytes between the tokens of a warp's partial sums: a multiple of 8, and the four lanes that hold tokens 2t of a row
// pair fall on different banks.
constexpr int partial_pitch(int atoms) { return (atoms * layout::kAtomRows + 4) * 4; }

template <class Codes_, int kAtoms_, int kTokenTiles_, int kGroups_, ScaleSource kScales_>
struct Config {
  using Codes = Codes_;
  using T = typename Codes::T;
  static constexpr int kTokenTiles = kTokenTiles_;  // n8 tiles
  static constexpr int kGroups = kGroups_;          // scale groups in a block: 1, 2, 4
  static constexpr ScaleSource kScales = kScales_;
  static constexpr int kAtoms = kAtoms_;                    // of a warp: 1, 2, 4
  static constexpr int kRows = kAtoms * layout::kAtomRows;  // of a unit
  static constexpr int kUnitsPerSlab = layout::kAtomsPerBlock / kAtoms;
  static constexpr bool kSharedX = kTokenTiles > 2;
  // Two stages: block i + 2 takes the place of block i. Three: it takes that of block i - 1, which everyone has read
  // when they meet before block i.
  static constexpr int kStages = kSharedX ? 3 : 2;
  // Warps of a CTA: what 64 K registers allow without spills.
  static constexpr bool kLarge = kScales == ScaleSource::kResolved || (Codes::kTable && kAtoms == 4);
  static constexpr int kWarps = kTokenTiles > 2 ? 8 : kTokenTiles == 2 && kLarge ? 12 : kMaxWarps;
  static constexpr int kStepsPerGroup = layout::kSteps / kGroups;
  static constexpr int kTokens = kTokenTiles * kTokensPerTile;
  // Sums are added by the first kSumLanes lanes of a warp, kRowsPerLane rows of a unit each.
  static constexpr int kRowsPerLane = kRows > layout::kLanes ? 2 : 1;
  static constexpr int kSumLanes = kRows / kRowsPerLane;
};

// A warp's sums over the rows a lane finishes.
template <int kRows>
struct Sums {
  float v[kRows];
};

template <class C>
class Kernel {
 public:
  using T = typename C::T;
  using Codes = typename C::Codes;
  using Barrier = cutlass::arch::ClusterTransactionBarrier;

  __device__ __forceinline__ Kernel(const Params& params, char* shared) : p(params) {
    const uint32_t base = cute::cast_smem_ptr_to_uint(shared);
    if (Codes::kTable && (base & 0xFFFFFFu) > kSharedBase) __trap();
    window = base & 0xFF000000u;  // a CTA of a cluster sees its own shared memory from rank << 24 on
    lane = threadIdx.x & 31;
    warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x >> 5, 0);
    wk = warp * p.row_warps_inverse >> 8;
    wr = warp - wk * p.row_warps;
    rank = blockIdx.x & (p.cluster - 1);
    cluster_index = blockIdx.x >> p.cluster_shift;
    const int part = rank * p.k_warps + wk;
    block0 = part * p.part_blocks + min(part, p.part_rest);
    blocks = p.part_blocks + (part < p.part_rest ? 1 : 0);
    asm("" : "+r"(blocks));  // one value: kept as its two terms, one of them was spilled
    ring = window + p.ring + warp * p.ring_bytes;
    x_end = p.k - (block0 + blocks) * layout::kBlockK;
  }

  __device__ __forceinline__ void run() {
    launch_dependents();
    start_fill(cluster_index);
    start_x();
#pragma unroll 1
    for (int i = 0; i < kAhead; ++i) fill(i, !p.programmatic_launch);
    scales.start(p, window, lane, warp);
    scales.start_unit(p, unit_of(cluster_index), block0, lane);
    if constexpr (kHopper) {
      if (p.cluster > 1) {
        if (threadIdx.x == 0) {
          Barrier::init(pointer(exchange_barrier(0)), 1);
          Barrier::init(pointer(exchange_barrier(1)), 1);
          cutlass::arch::fence_barrier_init();
        }
        __syncwarp();
        cute::cluster_arrive_relaxed();
      }
    }
    if constexpr (Codes::kTable) build_pair_table();
    wait_for_previous_kernel();
    if (p.programmatic_launch) {
#pragma unroll 1
      for (int i = 0; i < kAhead; ++i) request_x(i);
      cute::cp_async_wait<0>();
    }
    if constexpr (Codes::kTable || Scales<C>::kResolve) __syncthreads();

    int pass = 0;
    for (int tile = cluster_index; tile < p.tiles; tile += p.clusters, ++pass) {
      if (pass > 0) scales.start_unit(p, unit_of(tile), block0, lane);
      multiply_tile();
      store_partial(pass);
      __syncthreads();
      if (p.cluster == 1) {
        finish_in_cta(tile);
      } else {
        finish_in_cluster(tile, pass);
      }
    }
  }

 private:
  static constexpr int kAhead = 2;  // blocks requested before the one that is read

  const Params& p;
  uint32_t window, ring;
  int lane, warp, wk, wr, rank, cluster_index;
  int block0, blocks;  // this warp's k blocks
  // What to request next: this lane's 16 bytes of each piece.
  const uint8_t* fill_codes;
  const uint8_t* fill_scales;  // of the slab
  const uint8_t* fill_zeros;
  const T* fill_x;
  int fill_tile, fill_block, fill_left, fill_x_left;
  int x_end;  // fill_x_left behind the last of this warp's blocks
  int read_stage = 0;
  float output_factor = 1;
  Scales<C> scales;
  float acc[C::kAtoms][C::kTokenTiles][4];

  __device__ static uint64_t* pointer(uint32_t address) {
    return static_cast<uint64_t*>(__cvta_shared_to_generic(address));
  }

  __device__ __forceinline__ uint32_t exchange_barrier(int buffer) const { return window + p.barriers + buffer * 8; }

  // ---- the ring ----

  // Row warps behind the weight's last unit do that one again; nobody stores it.
  __device__ __forceinline__ int unit_of(int tile) const { return min(tile * p.row_warps + wr, p.units - 1); }

  __device__ __forceinline__ uint32_t weight_stage(int stage) const { return ring + stage * p.stage_bytes; }
  __device__ __forceinline__ uint32_t x_stage(int stage) const {
    return C::kSharedX ? window + p.x_at + (wk * C::kStages + stage) * p.x_stage_bytes : weight_stage(stage) + p.x_at;
  }

  __device__ __forceinline__ void start_fill(int tile) {
    const int unit = unit_of(tile);
    const uint32_t slab = uint32_t(unit) / C::kUnitsPerSlab;
    fill_tile = tile;
    fill_block = block0;
    fill_left = blocks;
    fill_codes = p.codes + uint64_t(slab) * p.slab_code_bytes + uint32_t(block0) * kBlockBytes +
                 unit % C::kUnitsPerSlab * (C::kAtoms * kAtomBytes) + lane * 16;
    fill_scales = p.scales + uint64_t(slab) * p.slab_scale_bytes + lane * 16;
    if constexpr (Scales<C>::kZeros) fill_zeros = p.zeros + uint64_t(slab) * p.slab_zero_bytes + lane * 16;
  }

  __device__ __forceinline__ void start_x() {
    asm volatile("" ::: "memory");  // a branch, as in next_tile
    fill_x_left = p.k - block0 * layout::kBlockK;
    fill_x = static_cast<const T*>(p.x) + (lane >> 3) * p.ldx + block0 * layout::kBlockK + (lane & 7) * 8;
    if constexpr (C::kSharedX) fill_x += wr * p.x_step;
  }

  __device__ static void copy_16(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  }

  // `bytes` from `from`, of which every lane has its 16 already added.
  __device__ __forceinline__ void copy_groups(uint32_t to, const uint8_t* from, uint32_t bytes) const {
    constexpr int kMost = Scales<C>::kGroupScales * 4;
#pragma unroll
    for (int i = 0; i < kMost; i += layout::kLanes * 16) {
      if (i + lane * 16 < bytes) copy_16(to + i + lane * 16, from + i);
    }
  }

  // Codes, scales and zeros of the next block.
  __device__ __forceinline__ void request_weights(uint32_t stage) const {
#pragma unroll
    for (int r = 0; r < C::kAtoms; ++r) copy_16(stage + r * kAtomBytes + lane * 16, fill_codes + r * kAtomBytes);
    const uint32_t group = uint32_t(fill_block >> p.group_shift);
    stage += C::kAtoms * kAtomBytes;
    copy_groups(stage, fill_scales + group * p.group_scale_bytes, p.group_scale_bytes);
    if constexpr (Scales<C>::kZeros) {
      if (p.zero_bytes != 0) {
        copy_groups(stage + p.group_scale_bytes, fill_zeros + group * p.group_zero_bytes, p.group_zero_bytes);
      }
    }
  }

  // x of the next block. Eight lanes have a token's 64 values, four tokens at a time; what lies behind K becomes zero,
  // because the weight's padding is not.
  __device__ __forceinline__ void request_x(int stage) {
    const int left = fill_x_left - (lane & 7) * 8;  // k values from this lane's on
    const int every = C::kSharedX ? p.row_warps : 1;
    const int first = (C::kSharedX ? 4 * wr : 0) + (lane >> 3);
    const uint32_t to = x_stage(stage) + first * kXPitch + (lane & 7) * 16;
    const T* x = fill_x;
    if (p.x_vector) {
      const int bytes = left > 0 ? 16 : 0;
#pragma unroll
      for (int token = 0; token < C::kTokens; token += 4) {
        if (first + token * every < p.m) {
          asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to + token * every * kXPitch), "l"(x),
                       "r"(bytes)
                       : "memory");
        }
        x += every * p.x_step;
      }
    } else {
#pragma unroll 1
      for (int token = 0; first + token < p.m; token += 4 * every, x += every * p.x_step) {
#pragma unroll 1
        for (int i = 0; i < 8; ++i) {
          store_shared_2(to + token * kXPitch + i * 2, i < left ? reinterpret_cast<const uint16_t*>(x)[i] : 0);
        }
      }
    }
    fill_x += layout::kBlockK;
    fill_x_left -= layout::kBlockK;
    if (fill_x_left <= x_end) start_x();
  }

  // Requests the next block of this warp, if there is one, into a stage.
  __device__ __forceinline__ void fill(int stage, bool with_x) {
    if (fill_left > 0) {
      if (with_x) request_x(stage);
      request_weights(weight_stage(stage));
      next_block();
    }
    cute::cp_async_fence();
  }

  __device__ __forceinline__ void next_block() {
    fill_codes += kBlockBytes;
    ++fill_block;
    if (--fill_left == 0) next_tile();
  }

  // Goes on with the cluster's next tile.
  __device__ __forceinline__ void next_tile() {
    asm volatile("" ::: "memory");  // a branch: the block loop is faster without these instructions in it
    if (fill_tile + p.clusters < p.tiles) start_fill(fill_tile + p.clusters);
  }

  // Waits for the next block, then requests the one that may take the place of the block before.
  __device__ __forceinline__ void acquire_stage() {
    cute::cp_async_wait<kAhead - 1>();
    if constexpr (C::kSharedX) {
      sync_column();
      fill(read_stage == 0 ? 2 : read_stage - 1, true);
    } else {
      __syncwarp();
    }
  }

  // All lanes have read the block.
  __device__ __forceinline__ void release_stage() {
    if constexpr (!C::kSharedX) {
      __syncwarp();
      fill(read_stage, true);
    }
    read_stage = read_stage + 1 == C::kStages ? 0 : read_stage + 1;
  }

  // The row warps of this warp's part of K.
  __device__ __forceinline__ void sync_column() const {
    if (p.row_warps == 1) {
      __syncwarp();
    } else {
      sync_warps(1 + wk, p.row_warps * layout::kLanes);  // barrier 0 is that of the CTA; with 2 row warps, 8 columns
    }
  }

  // ---- the table of value pairs ----

  __device__ __forceinline__ void build_pair_table() {
    const bool given = p.codebook_data != nullptr;
    const float factor = given ? search_factor() : p.codebook_factor;
    output_factor = 1 / factor;
    // Two threads an entry, 64 bytes each; the order of their pieces keeps eight threads on different banks.
    for (int i = threadIdx.x; i < 512; i += blockDim.x) {
      const int entry = i >> 1;
      const float low = given ? p.codebook_data[entry & 15] : p.codebook[entry & 15];
      const float high = given ? p.codebook_data[entry >> 4] : p.codebook[entry >> 4];
      const uint32_t pair = pack_pair<T>(low * factor, high * factor);
      const uint32_t at = window + kSharedBase + entry * 256 + (i & 1) * 64;
#pragma unroll
      for (int piece = 0; piece < 4; ++piece) {
        store_shared_16(at + ((piece + entry) & 3) * 16, make_uint4(pair, pair, pair, pair));
      }
    }
  }

  // A weight's own codebook is not known to the host: every lane tries one factor.
  __device__ __noinline__ float search_factor() const {
    const float error =
        rounding_error(p.codebook_data, factor_at(threadIdx.x % kFactors), [](float v) { return float(T(v)); });
    // Errors are not negative, so that their bits are in their order.
    const uint32_t least = __reduce_min_sync(0xFFFFFFFFu, __float_as_uint(error));
    return factor_at(__ffs(__ballot_sync(0xFFFFFFFFu, __float_as_uint(error) == least)) - 1);
  }

  // ---- the main loop ----

  __device__ __forceinline__ void multiply_tile() {
#pragma unroll
    for (int r = 0; r < C::kAtoms; ++r)
#pragma unroll
      for (int j = 0; j < C::kTokenTiles; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[r][j][i] = 0;
    uint32_t x_row[C::kTokenTiles];  // in a stage, of ldmatrix
#pragma unroll
    for (int j = 0; j < C::kTokenTiles; ++j) {
      // Tokens beyond M: the last one again, in columns that nobody reads.
      x_row[j] = min(j * kTokensPerTile + (lane & 7), p.m - 1) * kXPitch + (lane >> 3) * 16;
    }
    const uint32_t lane_address = window + lane * 4;
#pragma unroll 1
    for (int left = blocks; left > 0; --left) {
      acquire_stage();
      const uint32_t stage = weight_stage(read_stage), x = x_stage(read_stage);
      uint32_t b[layout::kSteps][C::kTokenTiles][2];
#pragma unroll
      for (int j = 0; j < C::kTokenTiles; ++j) {
        load_matrices(x + x_row[j], b[0][j][0], b[0][j][1], b[1][j][0], b[1][j][1]);
        load_matrices(x + x_row[j] + 64, b[2][j][0], b[2][j][1], b[3][j][0], b[3][j][1]);
      }
      const uint32_t codes = stage + lane * 16;
      uint4 w = load_shared_16(codes);
      scales.resolve(p, stage + C::kAtoms * kAtomBytes, block0 + blocks - left, lane);
#pragma unroll
      for (int group = 0; group < C::kGroups; ++group) {
        float start[C::kTokenTiles][4];
#pragma unroll
        for (int j = 0; j < C::kTokenTiles; ++j) {
          if constexpr (Codes::kTable) {
            start[j][0] = start[j][1] = start[j][2] = start[j][3] = 0;
          } else {
            // -(magic + bias) * sum(x) of the group: an MMA with a constant as weights.
            const uint32_t constant[4] = {p.start_low, p.start_high, p.start_low, p.start_high};
            float zero[4] = {0, 0, 0, 0};
#pragma unroll
            for (int s = 0; s < C::kStepsPerGroup; ++s) {
              multiply<T>(start[j], constant, b[group * C::kStepsPerGroup + s][j], s == 0 ? zero : start[j]);
            }
          }
        }
        const typename Scales<C>::Group group_scales = scales.load(stage + C::kAtoms * kAtomBytes, group);
#pragma unroll
        for (int r = 0; r < C::kAtoms; ++r) {
          // The next atom's codes are on their way while this one's are multiplied.
          const bool last = r + 1 == C::kAtoms;
          const uint4 next =
              last && group + 1 == C::kGroups ? w : load_shared_16(codes + (last ? 0 : r + 1) * kAtomBytes);
          float d[C::kTokenTiles][4];
#pragma unroll
          for (int s = 0; s < C::kStepsPerGroup; ++s) {
            const int step = group * C::kStepsPerGroup + s;
            uint32_t a[4];
            Codes::decode(step == 0 ? w.x : step == 1 ? w.y : step == 2 ? w.z : w.w, lane_address, a);
#pragma unroll
            for (int j = 0; j < C::kTokenTiles; ++j) multiply<T>(d[j], a, b[step][j], s == 0 ? start[j] : d[j]);
          }
          if constexpr (Scales<C>::kZeros) {
            if (p.zero_bytes != 0) {
              const float2 zero = scales.load_zero(p, group, r);
#pragma unroll
              for (int j = 0; j < C::kTokenTiles; ++j) {
                d[j][0] += zero.x * start[j][0];
                d[j][1] += zero.x * start[j][1];
                d[j][2] += zero.y * start[j][2];
                d[j][3] += zero.y * start[j][3];
              }
            }
          }
          const float2 scale = group_scales.of(r);
#pragma unroll
          for (int j = 0; j < C::kTokenTiles; ++j) {
            acc[r][j][0] += scale.x * d[j][0];
            acc[r][j][1] += scale.x * d[j][1];
            acc[r][j][2] += scale.y * d[j][2];
            acc[r][j][3] += scale.y * d[j][3];
          }
          w = next;
        }
      }
      release_stage();
    }
  }

  // ---- sums ----

  // The lane, read anew: what the following functions compute from it would otherwise be computed before the tile loop,
  // and spilled.
  __device__ static int fresh_lane() {
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
  }

  __device__ __forceinline__ void store_partial(int pass) {
    if (pass > 0) __syncthreads();  // everyone has read the sums of the tile before
    constexpr int kPitch = partial_pitch(C::kAtoms);
    const int lane = fresh_lane();
    const int first_token = 2 * (lane & 3);
    const uint32_t to = window + p.partial_at + warp * p.partial_bytes + first_token * kPitch + (lane >> 2) * 4;
#pragma unroll
    for (int j = 0; j < C::kTokenTiles; ++j)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int token = j * kTokensPerTile + odd;  // after first_token
        if (first_token + token >= p.m) continue;
#pragma unroll
        for (int r = 0; r < C::kAtoms; ++r) {
          store_shared_float(to + token * kPitch + r * layout::kAtomRows * 4, acc[r][j][odd]);
          store_shared_float(to + token * kPitch + (r * layout::kAtomRows + 8) * 4, acc[r][j][2 + odd]);
        }
      }
  }

  // Warp (wr, wk) adds the k warps' sums of row warp wr for the tokens wk, wk + k_warps, ..; a lane has
  // kRowsPerLane rows of the unit.
  __device__ __forceinline__ Sums<C::kRowsPerLane> add_k_warps(int token, int lane) const {
    uint32_t at =
        window + p.partial_at + wr * p.partial_bytes + token * partial_pitch(C::kAtoms) + lane * (C::kRowsPerLane * 4);
    const uint32_t step = p.row_warps * p.partial_bytes;
    Sums<C::kRowsPerLane> sum{};
#pragma unroll 4
    for (int i = 0; i < p.k_warps; ++i, at += step) {
      if constexpr (C::kRowsPerLane == 2) {
        const float2 v = load_shared_float2(at);
        sum.v[0] += v.x;
        sum.v[1] += v.y;
      } else {
        sum.v[0] += load_shared_float(at);
      }
    }
    return sum;
  }

  __device__ __forceinline__ void store(int token, int row, const float (&v)[C::kRowsPerLane], float scale,
                                        const float (&bias)[C::kRowsPerLane]) const {
    T* y = static_cast<T*>(p.y) + token * p.ldy + row;
    if (C::kRowsPerLane == 2 && p.y_pairs && row + 1 < p.n) {
      *reinterpret_cast<uint32_t*>(y) =
          pack_pair<T>(v[0] * scale + bias[0], v[C::kRowsPerLane - 1] * scale + bias[C::kRowsPerLane - 1]);
      return;
    }
#pragma unroll
    for (int i = 0; i < C::kRowsPerLane; ++i) {
      if (row + i < p.n) y[i] = T(v[i] * scale + bias[i]);
    }
  }

  __device__ __forceinline__ void load_bias(int row, float (&bias)[C::kRowsPerLane]) const {
#pragma unroll
    for (int i = 0; i < C::kRowsPerLane; ++i) {
      bias[i] = p.bias != nullptr && row + i < p.n ? float(static_cast<const T*>(p.bias)[row + i]) : 0.0f;
    }
  }

  // What sums are multiplied with.
  __device__ __forceinline__ float output_scale() const {
    return (p.tensor_scale != nullptr ? *p.tensor_scale : 1.0f) * (Codes::kTable ? output_factor : 1.0f);
  }

  __device__ __forceinline__ void finish_in_cta(int tile) const {
    const int lane = fresh_lane();
    const int row = (tile * p.row_warps + wr) * C::kRows + lane * C::kRowsPerLane;
    if (row >= p.n || wk >= p.m || lane >= C::kSumLanes) return;
    float bias[C::kRowsPerLane];
    load_bias(row, bias);
    for (int token = wk; token < p.m; token += p.k_warps)
      store(token, row, add_k_warps(token, lane).v, output_scale(), bias);
  }

  // A CTA finishes 1 / cluster of the tile's rows: `share` lanes' worth. Everyone sends it their sums.
  __device__ __forceinline__ void finish_in_cluster(int tile, int pass) {
    if constexpr (kHopper) {
      const int lane = fresh_lane();
      const int buffer = pass & 1;
      const int share = p.row_warps * C::kSumLanes / p.cluster;
      constexpr int kLaneBytes = C::kRowsPerLane * 4;
      const uint32_t exchange = window + p.exchange_at + buffer * p.exchange_bytes;
      const uint32_t barrier = exchange_barrier(buffer);
      if (threadIdx.x == 0) Barrier::arrive_and_expect_tx(pointer(barrier), p.cluster * p.m * share * kLaneBytes);
      if (pass == 0) cute::cluster_wait();  // the others run, and their barriers are there
      if (lane < C::kSumLanes) {
        const int slot = wr * C::kSumLanes + lane;
        const int owner = slot / share;
        const uint32_t to = exchange + (rank * p.m * share + slot - owner * share) * kLaneBytes;
        for (int token = wk; token < p.m; token += p.k_warps) {
          const Sums<C::kRowsPerLane> sum = add_k_warps(token, lane);
          if constexpr (C::kRowsPerLane == 2) {
            send_float2(to + token * share * kLaneBytes, barrier, owner, {sum.v[0], sum.v[1]});
          } else {
            cute::store_shared_remote(__float_as_uint(sum.v[0]), to + token * share * kLaneBytes, barrier, owner);
          }
        }
      }
      const int thread = warp * layout::kLanes + lane;
      const int first_token = thread / share;
      const int slot = thread - first_token * share;
      const int row = tile * p.row_warps * C::kRows + (rank * share + slot) * C::kRowsPerLane;
      float bias[C::kRowsPerLane];
      load_bias(row, bias);
      const float scale = output_scale();
      Barrier::wait(pointer(barrier), pass >> 1 & 1);
      if (row >= p.n) return;
      const int token_step = p.row_warps * p.k_warps * layout::kLanes / share;
      for (int token = first_token; token < p.m; token += token_step) {
        uint32_t at = exchange + (token * share + slot) * kLaneBytes;
        float v[C::kRowsPerLane] = {};
#pragma unroll 2
        for (int source = 0; source < p.cluster; ++source, at += p.m * share * kLaneBytes) {
          if constexpr (C::kRowsPerLane == 2) {
            const float2 s = load_shared_float2(at);
            v[0] += s.x;
            v[1] += s.y;
          } else {
            v[0] += load_shared_float(at);
          }
        }
        store(token, row, v, scale, bias);
      }
    }
  }
};

template <class C>
__global__ void __launch_bounds__(C::kWarps* kThreadsPerWarp, 1) stream_kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) char shared[];
  Kernel<C>(p, shared).run();
}

}  // namespace cutlass_ext::cuda::stream
