// The stream kernel: y[M, N] = x[M, K] W[N, K]^T (+ bias) for few tokens and 4-bit W, at the speed of reading W.
//
// Split    A tile is the rows of `row_warps` units; a unit is what a warp's atoms cover, 16 rows each. A cluster owns a
//          tile; its CTAs, and the k warps of each, split K. So every weight is read by one warp, once, and only sums
//          travel: between the k warps of a CTA through shared memory, between the CTAs of a cluster by asynchronous
//          stores into the shared memory of the CTA that owns the row. Every sum is added in one fixed order.
// Ring     A warp has a ring of stages of its own and waits for nobody. A stage is a 64-k block of its unit: codes,
//          scales, zero points. Weights are requested first of all, before the grid dependency.
// x        Where it fits, the CTA's part of K of all tokens is loaded once, by the warps that need it; row warps share
//          it. Otherwise every warp loads each block's x along with its weights.
// Decode   Weights are the A operand of the MMA, tokens its n: codes.cuh. Scales multiply the fp32 sums of a group.
//
// Instructions count: a 64 x 64 block of int4 takes about 200 of the 530 that an SM of an H200 can issue while its
// memory delivers the block, but a weight of 8 MB is over after a few blocks a warp, and then every instruction before
// the first request and behind the last block is time.
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
// Bytes between the tokens of x, so that ldmatrix reads eight rows from different banks.
constexpr int kXPadding = 16;
constexpr int kBlockXPitch = layout::kBlockK * 2 + kXPadding;

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
  // A stage: codes, scales, zeros.
  static constexpr int kScalesAt = kAtoms * kAtomBytes;
  static constexpr int kMaxScaleBytes = kGroups * layout::kBlockRows * scale_bytes_of(kScales);
  static constexpr int kZerosAt = kScalesAt + kMaxScaleBytes;
  static constexpr bool kZeros = has_zeros(kScales, !Codes::kTable);
  // A multiple of 128: a copy of 512 bytes that straddles one line more costs 8% (8192 x 8192, M = 1, H200,
  // 2026-11-21).
  static constexpr int kStageBytes = (kZerosAt + (kZeros ? kMaxScaleBytes : 0) + 127) / 128 * 128;
  // Where a CTA has many tiles a third stage keeps the memory busy while they change: 28672 x 4096, M = 1: 18.05 us
  // instead of 18.74; 4096 x 4096: 5.34 instead of 5.29 (H200, 2026-11-21).
  static constexpr int kStages = kTokenTiles == 1 && kAtoms == 4 && !Codes::kTable ? 3 : 2;
  // Shared addresses: the pair table, the nested map, the rings.
  static constexpr uint32_t kMapAt = kSharedBase + (Codes::kTable ? kPairTableBytes : 0);
  static constexpr uint32_t kRing = kMapAt + (kScales == ScaleSource::kNested ? kNestedMapSize * kMapEntryBytes : 0);
  // Warps of a CTA: what 64 K registers allow without spills.
  static constexpr bool kLarge = kScales == ScaleSource::kResolved ||
                                 (Codes::kTable && (kAtoms == 4 || (kAtoms == 2 && kScales == ScaleSource::kNested)));
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
    lane = threadIdx.x;
    wr = threadIdx.y;
    wk = threadIdx.z;
    row_warps = blockDim.y;
    k_warps = blockDim.z;
    warp = wk * row_warps + wr;
    rank = blockIdx.x;
    const int part = rank * k_warps + wk;
    block0 = part * p.part_blocks + min(part, p.part_rest);
    blocks = p.part_blocks + (part < p.part_rest ? 1 : 0);
    asm("" : "+r"(blocks));  // one value: kept as its two terms, one of them was spilled
    ring = window + C::kRing + warp * (C::kStages * C::kStageBytes) + lane * 16;
    read_stage = ring;
  }

  __device__ __forceinline__ void run() {
    launch_dependents();
    start_fill(blockIdx.y);
    request_weights(ring);
    start_x();
    // A dependent launch asks for the first stage's weights only before it waits: behind all stages x came 600 ns
    // later, and a kernel whose predecessor had ended was 2 to 12% slower instead of 1 to 2% (H200,
    // scripts/pdl_neighbours.py, 2026-11-21). In a chain the waiting is covered by other CTAs' requests: 4096 x 4096, M
    // = 1, 4.1 instead of 4.4 us.
    if (kHopper && p.programmatic_launch) {
      prepare();
      wait_for_previous_kernel();
    }
    request_first_x(0);
    cute::cp_async_fence();
#pragma unroll 1
    for (int i = 1; i < C::kStages; ++i) {
      request_weights(ring + i * C::kStageBytes);
      request_first_x(i);
      cute::cp_async_fence();
    }
    if (!kHopper || !p.programmatic_launch) prepare();
    cute::cp_async_wait<C::kStages - 1>();
    // The table, the map of nested scales, and x that other warps have loaded.
    if (Codes::kTable || Scales<C>::kResolve || Scales<C>::kNestedDirect || row_warps > 1) __syncthreads();

    int pass = 0;
    for (int tile = blockIdx.y; tile < p.tiles; tile += gridDim.y, ++pass) {
      if (pass > 0) scales.start_unit(p, unit_of(tile), block0, lane);
      multiply_tile();
      store_partial(pass);
      if (gridDim.x == 1) {
        finish_in_cta(tile);
      } else {
        finish_in_cluster(tile, pass);
      }
    }
  }

 private:
  const Params& p;
  uint32_t window;
  uint32_t ring;     // of this warp, this lane's 16 bytes
  uint32_t x_first;  // this warp's first block of x
  int lane, warp, wk, wr, row_warps, k_warps, rank;
  int block0, blocks;  // this warp's k blocks
  // What to request next: this lane's 16 bytes of each piece.
  const uint8_t* fill_codes;
  const uint8_t* fill_scales;  // of the slab
  const uint8_t* fill_zeros;
  int fill_tile, fill_block, fill_left;
  uint32_t read_stage, read_x;  // of the block to multiply next
  float output_factor = 1;
  Scales<C> scales;
  float acc[C::kAtoms][C::kTokenTiles][4];

  __device__ static uint64_t* pointer(uint32_t address) {
    return static_cast<uint64_t*>(__cvta_shared_to_generic(address));
  }

  __device__ __forceinline__ uint32_t exchange_barrier(int buffer) const { return window + p.barriers + buffer * 8; }

  // What needs neither x nor the ring.
  __device__ __forceinline__ void prepare() {
    scales.start(p, window, lane, warp, row_warps * k_warps * layout::kLanes);
    scales.start_unit(p, unit_of(blockIdx.y), block0, lane);
    if constexpr (kHopper) {
      if (gridDim.x > 1) {
        if (warp == 0 && lane == 0) {
          Barrier::init(pointer(exchange_barrier(0)), 1);
          Barrier::init(pointer(exchange_barrier(1)), 1);
          cutlass::arch::fence_barrier_init();
        }
        __syncwarp();
        cute::cluster_arrive_relaxed();
      }
    }
    if constexpr (Codes::kTable) build_pair_table();
  }

  // ---- the ring ----

  // Row warps behind the weight's last unit do that one again; nobody stores it.
  __device__ __forceinline__ uint32_t unit_of(int tile) const { return min(tile * row_warps + wr, p.units - 1); }

  __device__ __forceinline__ void start_fill(int tile) {
    const uint32_t unit = unit_of(tile);
    const uint32_t slab = unit / C::kUnitsPerSlab;
    fill_tile = tile;
    fill_block = block0;
    fill_left = blocks;
    fill_codes = p.codes + uint64_t(slab) * p.slab_code_bytes + uint32_t(block0) * kBlockBytes +
                 unit % C::kUnitsPerSlab * (C::kAtoms * kAtomBytes) + lane * 16;
    fill_scales = p.scales + uint64_t(slab) * p.slab_scale_bytes + lane * 16;
    if constexpr (C::kZeros) fill_zeros = p.zeros + uint64_t(slab) * p.slab_zero_bytes + lane * 16;
  }

  __device__ static void copy_16(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  }

  // `bytes` from `from`; `to` and `from` have every lane's 16 already added.
  __device__ __forceinline__ void copy_groups(uint32_t to, const uint8_t* from, uint32_t bytes) const {
#pragma unroll
    for (int i = 0; i < C::kMaxScaleBytes; i += layout::kLanes * 16) {
      if (i + lane * 16 < bytes) copy_16(to + i, from + i);
    }
  }

  // Codes, scales and zeros of the next block, if there is one.
  __device__ __forceinline__ void request_weights(uint32_t stage) {
    if (fill_left <= 0) return;
#pragma unroll
    for (int r = 0; r < C::kAtoms; ++r) copy_16(stage + r * kAtomBytes, fill_codes + r * kAtomBytes);
    const uint32_t group = uint32_t(fill_block >> p.group_shift);
    constexpr bool kKnown = !Scales<C>::kResolve;
    const uint32_t bytes = kKnown ? C::kMaxScaleBytes : p.group_scale_bytes;
    copy_groups(stage + C::kScalesAt, fill_scales + uint64_t(group) * bytes, bytes);
    if constexpr (C::kZeros) {
      copy_groups(stage + C::kZerosAt, fill_zeros + uint64_t(group) * p.group_zero_bytes, p.group_zero_bytes);
    }
    fill_codes += kBlockBytes;
    ++fill_block;
    if (--fill_left == 0) next_tile();
  }

  // Goes on with the cluster's next tile.
  __device__ __forceinline__ void next_tile() {
    asm volatile("" ::: "memory");  // a branch: the block loop is faster without these instructions in it
    if (fill_tile + int(gridDim.y) < p.tiles) start_fill(fill_tile + gridDim.y);
  }

  // Copies 16 bytes of x, or zeros behind K: the weight's padding is not zero.
  __device__ __forceinline__ void copy_x(uint32_t to, const T* from, int k) const {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(k < p.k ? 16 : 0)
                 : "memory");
  }

  // The same for any alignment of x and K.
  __device__ __forceinline__ void copy_x_values(uint32_t to, const T* from, int k) const {
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
      store_shared_2(to + i * 2, k + i < p.k ? reinterpret_cast<const uint16_t*>(from)[i] : 0);
    }
  }

  // This warp's part of K, the tokens dealt out among the row warps.
  __device__ __forceinline__ void request_resident_x() const {
    const int k0 = block0 * layout::kBlockK + lane * 8, end = (block0 + blocks) * layout::kBlockK;
    const T* from = static_cast<const T*>(p.x) + uint64_t(p.ldx) * uint32_t(wr);
    uint32_t to = x_first + wr * p.x_pitch + lane * 16;
    const uint64_t step = uint64_t(p.ldx) * uint32_t(row_warps);
#pragma unroll 1
    for (int token = wr; token < p.m; token += row_warps, from += step, to += row_warps * p.x_pitch) {
#pragma unroll 1
      for (int k = k0; k < end; k += layout::kLanes * 8) {
        const uint32_t at = to + (k - k0) * 2;
        if (p.x_vector) {
          copy_x(at, from + k, k);
        } else {
          copy_x_values(at, from + k, k);
        }
      }
    }
  }

  // A block's x: eight lanes have a token's 64 values.
  __device__ __forceinline__ void request_block_x(uint32_t slot, int block) const {
    // For sm_80, where int4 with four atoms and 16 tokens has no register left (found by trying): bf16 reads the lane
    // anew, fp16 has the loop rolled.
    constexpr bool kHalf = std::is_same_v<T, __half>;
    const int lane = kHopper || kHalf ? this->lane : fresh_lane();
    const int first = lane >> 3;
    const int k = block * layout::kBlockK + (lane & 7) * 8;
    const T* from = static_cast<const T*>(p.x) + uint64_t(p.ldx) * uint32_t(first) + k;
    uint32_t to = slot + first * kBlockXPitch + (lane & 7) * 16;
    if (p.x_vector) {
#pragma unroll kHopper || !kHalf ? C::kTokens / 4 : 1
      for (int token = 0; token < C::kTokens; token += 4) {
        if (first + token < p.m) copy_x(to + token * kBlockXPitch, from, k);
        from += uint64_t(p.ldx) * 4;
      }
    } else {
#pragma unroll 1
      for (int token = first; token < p.m; token += 4, from += uint64_t(p.ldx) * 4, to += 4 * kBlockXPitch) {
        copy_x_values(to, from, k);
      }
    }
  }

  __device__ __forceinline__ void start_x() {
    asm volatile("" ::: "memory");  // the first request of weights does not wait for these parameters
    if (p.x_resident) {
      const int first_part = rank * k_warps;
      const int before = block0 - first_part * p.part_blocks - min(first_part, p.part_rest);
      x_first = window + p.x_at + before * (layout::kBlockK * 2);
    } else {
      x_first = window + p.x_at + warp * (C::kStages * p.x_step);
    }
    read_x = x_first;
  }

  // What belongs to the request of stage `i`'s first block: that block's x; or with the first one all of the part.
  __device__ __forceinline__ void request_first_x(int i) const {
    if (p.x_resident) {
      if (i == 0) request_resident_x();
    } else if (i < blocks) {
      request_block_x(x_first + i * p.x_step, block0 + i);
    }
  }

  // ---- the table of value pairs ----

  __device__ __forceinline__ void build_pair_table() {
    const bool given = p.codebook_data != nullptr;
    const float factor = given ? search_factor() : p.codebook_factor;
    output_factor = 1 / factor;
    // Two threads an entry, 64 bytes each; the order of their pieces keeps eight threads on different banks.
    for (int i = warp * layout::kLanes + lane; i < 512; i += row_warps * k_warps * layout::kLanes) {
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
        rounding_error(p.codebook_data, factor_at(lane % kFactors), [](float v) { return float(T(v)); });
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
    uint32_t x_row[C::kTokenTiles];  // in a block, of ldmatrix
#pragma unroll
    for (int j = 0; j < C::kTokenTiles; ++j) {
      // Tokens beyond M: the last one again, in columns that nobody reads.
      x_row[j] = min(j * kTokensPerTile + (lane & 7), p.m - 1) * p.x_pitch + (lane >> 3) * 16;
    }
    const uint32_t lane_address = window + lane * 4;
    if (p.x_resident) read_x = x_first;
#pragma unroll 1
    for (int left = blocks; left > 0; --left) {
      cute::cp_async_wait<C::kStages - 1>();
      __syncwarp();
      uint32_t b[layout::kSteps][C::kTokenTiles][2];
#pragma unroll
      for (int j = 0; j < C::kTokenTiles; ++j) {
        load_matrices(read_x + x_row[j], b[0][j][0], b[0][j][1], b[1][j][0], b[1][j][1]);
        load_matrices(read_x + x_row[j] + 64, b[2][j][0], b[2][j][1], b[3][j][0], b[3][j][1]);
      }
      uint4 w = load_shared_16(read_stage);
      const uint32_t raw = read_stage - lane * 16;
      scales.resolve(p, raw, block0 + blocks - left, lane);
#pragma unroll
      for (int group = 0; group < C::kGroups; ++group) {
        float start[C::kTokenTiles][4];
#pragma unroll
        for (int j = 0; j < C::kTokenTiles; ++j) {
          if constexpr (Codes::kTable) {
            start[j][0] = start[j][1] = start[j][2] = start[j][3] = 0;
          } else {
            // A multiple of sum(x) of the group: an MMA with a constant as weights.
            const uint32_t constant[4] = {p.start_low, p.start_high, p.start_low, p.start_high};
            float zero[4] = {0, 0, 0, 0};
#pragma unroll
            for (int s = 0; s < C::kStepsPerGroup; ++s) {
              multiply<T>(start[j], constant, b[group * C::kStepsPerGroup + s][j], s == 0 ? zero : start[j]);
            }
          }
        }
        const typename Scales<C>::Group group_scales = scales.load(raw, group);
        typename Scales<C>::Zeros zeros;
        const bool with_zeros = C::kZeros && (!Scales<C>::kResolve || p.zero_bytes != 0);
        if (with_zeros) zeros = scales.load_zeros(p, raw, group);
#pragma unroll
        for (int r = 0; r < C::kAtoms; ++r) {
          // The next atom's codes are on their way while this one's are multiplied.
          const bool last = r + 1 == C::kAtoms;
          const uint4 next =
              last && group + 1 == C::kGroups ? w : load_shared_16(read_stage + (last ? 0 : r + 1) * kAtomBytes);
          // The first atom's MMAs do not wait for those of the start. (Sixteen tokens have no registers for that.)
          const bool late = with_zeros || (r == 0 && C::kTokenTiles == 1);
          float d[C::kTokenTiles][4];
#pragma unroll
          for (int j = 0; j < C::kTokenTiles; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              d[j][i] = with_zeros ? start[j][i] * (i < 2 ? p.start_offset_low : p.start_offset_high)
                        : late     ? 0
                                   : start[j][i];
            }
#pragma unroll
          for (int s = 0; s < C::kStepsPerGroup; ++s) {
            const int step = group * C::kStepsPerGroup + s;
            uint32_t a[4];
            Codes::decode(step == 0 ? w.x : step == 1 ? w.y : step == 2 ? w.z : w.w, lane_address, a);
#pragma unroll
            for (int j = 0; j < C::kTokenTiles; ++j) multiply<T>(d[j], a, b[step][j], d[j]);
          }
          if (late && !Codes::kTable) {
            const float2 factor = with_zeros ? scales.start_factor(p, zeros, r) : float2{1, 1};
#pragma unroll
            for (int j = 0; j < C::kTokenTiles; ++j)
#pragma unroll
              for (int i = 0; i < 4; ++i) d[j][i] += (i < 2 ? factor.x : factor.y) * start[j][i];
          }
          const float2 scale = scales.scale_of(group_scales, r);
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
      __syncwarp();  // all lanes have read the block
      if (!p.x_resident && fill_left > 0) request_block_x(read_x, fill_block);
      request_weights(read_stage);
      cute::cp_async_fence();
      const bool wraps = read_stage == ring + (C::kStages - 1) * C::kStageBytes;
      read_stage = wraps ? ring : read_stage + C::kStageBytes;
      read_x = wraps && !p.x_resident ? x_first : read_x + p.x_step;
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
    const uint32_t step = row_warps * p.partial_bytes;
    Sums<C::kRowsPerLane> sum{};
#pragma unroll 8
    for (int i = 0; i < k_warps; ++i, at += step) {
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
    const int row = (tile * row_warps + wr) * C::kRows + lane * C::kRowsPerLane;
    const bool active = row < p.n && wk < p.m && lane < C::kSumLanes;
    float bias[C::kRowsPerLane];
    load_bias(row, bias);
    const float scale = output_scale();
    __syncthreads();
    if (!active) return;
    for (int token = wk; token < p.m; token += k_warps) store(token, row, add_k_warps(token, lane).v, scale, bias);
  }

  // A CTA finishes 1 / cluster of the lanes that have rows of a unit. Everyone sends it their sums.
  __device__ __forceinline__ void finish_in_cluster(int tile, int pass) {
    if constexpr (kHopper) {
      const int lane = fresh_lane();
      const int cluster = gridDim.x;
      const int buffer = pass & 1;
      constexpr uint32_t kLaneBytes = C::kRowsPerLane * 4;
      const int share = C::kSumLanes / cluster;                     // lanes of a unit
      const uint32_t token_bytes = row_warps * share * kLaneBytes;  // [CTA][token][row warp][lane]
      const uint32_t exchange = window + p.exchange_at + buffer * p.exchange_bytes + wr * share * kLaneBytes;
      const uint32_t barrier = exchange_barrier(buffer);
      const int owner = lane / share;
      const uint32_t to = exchange + rank * p.m * token_bytes + (lane - owner * share) * kLaneBytes;
      const int row = (tile * row_warps + wr) * C::kRows + (rank * share + lane) * C::kRowsPerLane;
      const bool finishes = lane < share && row < p.n;
      float bias[C::kRowsPerLane] = {};
      if (finishes) load_bias(row, bias);
      const float scale = output_scale();
      if (warp == 0 && lane == 0) {
        Barrier::arrive_and_expect_tx(pointer(barrier), cluster * p.m * token_bytes);
      }
      if (pass == 0) cute::cluster_wait();  // the others run, and their barriers are there
      __syncthreads();
      if (lane < C::kSumLanes) {
        for (int token = wk; token < p.m; token += k_warps) {
          const Sums<C::kRowsPerLane> sum = add_k_warps(token, lane);
          if constexpr (C::kRowsPerLane == 2) {
            send_float2(to + token * token_bytes, barrier, owner, {sum.v[0], sum.v[1]});
          } else {
            cute::store_shared_remote(__float_as_uint(sum.v[0]), to + token * token_bytes, barrier, owner);
          }
        }
      }
      Barrier::wait(pointer(barrier), pass >> 1 & 1);
      if (!finishes) return;
      for (int token = wk; token < p.m; token += k_warps) {
        uint32_t at = exchange + token * token_bytes + lane * kLaneBytes;
        float v[C::kRowsPerLane] = {};
#pragma unroll 2
        for (int source = 0; source < cluster; ++source, at += p.m * token_bytes) {
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
