// The wgmma kernel: y[M, N] = x[M, K] W[N, K]^T (+ bias) for many tokens and 4-bit W, computed as y^T = W x^T: weights
// are the A operand, in registers, tokens the n of the MMA, in shared memory.
//
// Roles    One warp copies, one to four warpgroups decode and multiply. They meet at the ring: a stage is a chunk (one
//          or two 64-k blocks) of x, by TMA with 128-byte swizzle and zeros beyond K, and of the codes, scales and
//          zeros of the CTA's 64-row slabs, by TMA too: a map's rows are slabs, a box has all of the CTA's.
// Scales   Three more warps make of scales of any type what decode multiplies with.
// Decode   The operands of a block (256 tokens: of half a block) are decoded while the MMAs of the one before run: two
//          sets of registers, and one group of MMAs always in flight.
// Split    A cluster owns a tile. Its CTAs have parts of K, their warpgroups parts of those, and leave their sums in
//          shared memory, of which each adds the tokens that it stores. Every sum is added in one fixed order.
// Output   A visitor tree scales the sums, adds the bias and casts (epilogue.cuh). A warp transposes its 16 rows in
//          shared memory, so that they leave in pieces of 32 bytes a token.
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/fast_math.h>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/mma_sm90.hpp>
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/wgmma/codes.cuh"
#include "kernels/cuda/wgmma/epilogue.cuh"
#include "kernels/cuda/wgmma/params.hpp"
#include "kernels/cuda/wgmma/scales.cuh"
#include "kernels/layout.hpp"

namespace cutlass_ext::cuda::wgmma {

constexpr int kAtomBytes = layout::atom_bytes(4);
constexpr int kBlockBytes = layout::block_bytes(4);
constexpr int kXRowBytes = layout::kBlockK * 2;  // a token's x in a stage
constexpr int kUnitTokens = 16;                  // what a stmatrix stores
constexpr int kUnitBytes = layout::kAtomRows * kUnitTokens * 2;
constexpr int kStartChunks = 4;   // requested before the CTA's first barrier
constexpr int kSumsBarrier = 15;  // 1 and up: of the warpgroups

struct Arguments {
  CUtensorMap x, codes, scales, zeros;
  cutlass::FastDivmod token_tiles;
  Params params;
};

template <class Codes_, int kTokens_, int kRowTiles_, int kWarpgroups_>
struct Config {
  using Codes = Codes_;
  using T = typename Codes::T;
  static constexpr int kTokens = kTokens_;                // of a tile
  static constexpr int kRowTiles = kRowTiles_;            // slabs of a warpgroup
  static constexpr int kWarpgroups = kWarpgroups_;        // that multiply, at most
  static constexpr int kBlocks = kTokens <= 128 ? 2 : 1;  // of a chunk: with 256 tokens x takes 32 KB a block
  static constexpr int kThreads = (kWarpgroups + 1) * kWarpgroupThreads;
  // Warpgroups may share a slab along K. With two slabs a warpgroup, sums do not stay in registers on the way.
  static constexpr bool kSplitsK = kRowTiles == 1;
  // Units of 16 tokens of a tile, and how many of them a warp transposes at once.
  static constexpr int kUnits = kTokens / kUnitTokens;
  static constexpr int kUnitsAtOnce = kUnits < 4 ? kUnits : 4;
  static constexpr int kOutputBytes = 4 * kUnitsAtOnce * kUnitBytes;  // of a warpgroup
  // Of 64 K registers: what the launch gives every thread is dealt again.
  static constexpr int kCopyRegisters = 56;
  static constexpr int kMultiplyRegisters = kWarpgroups == 2 ? 224 : kWarpgroups == 3 ? 152 : 104;
  static constexpr int kSums = kTokens / 2;  // of a lane and slab
  // k16 steps whose MMAs are one group: a block where registers alternate between two sets of operands, else half of
  // it.
  static constexpr int kSteps = kBlocks * kRowTiles % 2 == 0 ? layout::kSteps : layout::kSteps / 2;
  using Value = std::conditional_t<std::is_same_v<T, __half>, cutlass::half_t, cutlass::bfloat16_t>;
  using Atom =
      decltype(cute::GMMA::rs_op_selector<Value, Value, float, cute::Shape<cute::_64, cute::Int<kTokens>, cute::_16>,
                                          cute::GMMA::Major::K, cute::GMMA::Major::K>());
};

// Runs through the stages of the ring, over all tiles.
struct RingPosition {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance(int stages, int by = 1) {  // `by`: at most `stages`
    stage += by;
    if (stage >= stages) {
      stage -= stages;
      phase ^= 1;
    }
  }
};

struct Tile {
  int row, token;  // in tiles of a cluster
};

template <class C>
class Kernel {
 public:
  using T = typename C::T;
  using Codes = typename C::Codes;
  using Barrier = cutlass::arch::ClusterTransactionBarrier;

  __device__ __forceinline__ Kernel(const Arguments& arguments, uint8_t* shared)
      : arguments(arguments), p(arguments.params), memory(shared), shared(cute::cast_smem_ptr_to_uint(shared)) {
    full = reinterpret_cast<uint64_t*>(shared + p.barriers_at);
    resolved = full + kMaxStages;
    empty = resolved + kMaxStages;
    asm("" : "+r"(this->shared));  // kept: to compute it again takes the CTA's rank, read anew each time
    part = blockIdx.x % p.cluster;
    first_tile = blockIdx.x / p.cluster;
    chunk0 = part * p.part_chunks + min(part, p.part_rest);
    chunks = p.part_chunks + (part < p.part_rest ? 1 : 0);
  }

  __device__ __forceinline__ void run() {
    const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0);
    launch_dependents();
    int ahead = 0;  // chunks that are requested, or their weights
    if (warp == 0) {
      if (cute::elect_one_sync()) ahead = start();
    } else {
      if constexpr (Codes::kTable) copy_codebook();
      if (p.scale_type == int(ScaleType::kNested)) {
        for (int i = threadIdx.x - 32; i < kNestedMapSize; i += blockDim.x - 32) {
          store_shared_float(shared + p.nested_map_at + i * 4, __ldg(p.nested_map + i));
        }
      }
    }
    __syncthreads();
    if (warp < kWarpgroupThreads / 32) {
      cutlass::arch::warpgroup_reg_dealloc<C::kCopyRegisters>();
      if (warp == 0) {
        copy(ahead);
      } else {
        resolve(threadIdx.x - 32);
      }
    } else {
      cutlass::arch::warpgroup_reg_alloc<C::kMultiplyRegisters>();
      multiply(warp / 4 - 1);
    }
  }

 private:
  const Arguments& arguments;
  const Params& p;
  uint8_t* memory;
  uint32_t shared;
  uint64_t* full;      // of each stage: copied
  uint64_t* resolved;  // its scales too
  uint64_t* empty;     // read
  int part, first_tile;
  int chunk0, chunks;  // this CTA's

  __device__ __forceinline__ static void prefetch(const CUtensorMap& map) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&map));
  }

  __device__ __forceinline__ int tiles() const { return p.row_tiles * p.token_tiles; }

  __device__ __forceinline__ Tile tile_at(int index) const {
    Tile tile;
    arguments.token_tiles(tile.row, tile.token, index);
    return tile;
  }

  __device__ __forceinline__ int multiplying_threads() const { return int(blockDim.x) - kWarpgroupThreads; }

  __device__ __forceinline__ int first_slab(Tile tile) const { return tile.row * p.slabs_per_cta; }

  // ---- the codebook

  // Sixteen values of the type of x, low bytes first. By the second warp.
  __device__ __forceinline__ void copy_codebook() const {
    if (threadIdx.x >= 64) return;
    const int i = threadIdx.x % kCodebookSize;
    const float value = p.codebook_data != nullptr ? p.codebook_data[i] : p.codebook[i];
    const uint32_t bits = as_bits(Pair<T>::of(value, value));
    store_shared_byte(shared + p.codebook_at + i, bits);
    store_shared_byte(shared + p.codebook_at + kCodebookSize + i, bits >> 8);
  }

  // The low byte of a register. In C++ nvcc 13.0 makes a conversion from fp16 of it where the value was rounded to 16
  // bits.
  __device__ __forceinline__ static void store_shared_byte(uint32_t address, uint32_t v) {
    asm volatile("st.shared.u8 [%0], %1;" ::"r"(address), "r"(v) : "memory");
  }

  // By all warps that multiply: two threads an entry, 64 bytes each; the order of their pieces keeps eight threads on
  // different banks.
  __device__ __forceinline__ void build_pair_table() const {
    if ((shared & 0xFFFFFFu) != kSharedBase) __trap();
    const int threads = multiplying_threads();
    const auto value = [&](int code) {
      return uint32_t(memory[p.codebook_at + code]) | uint32_t(memory[p.codebook_at + kCodebookSize + code]) << 8;
    };
    for (int i = threadIdx.x - kWarpgroupThreads; i < 512; i += threads) {
      const int entry = i >> 1;
      const uint32_t pair = value(entry & 15) | value(entry >> 4) << 16;
      const uint32_t at = shared + entry * 256 + (i & 1) * 64;
#pragma unroll
      for (int piece = 0; piece < 4; ++piece) {
        store_shared_16(at + ((piece + entry) & 3) * 16, make_uint4(pair, pair, pair, pair));
      }
    }
    sync_warps(kSumsBarrier, threads);
  }

  __device__ __forceinline__ typename Codes::Table load_table() const {
    typename Codes::Table table;
    if constexpr (Codes::kPairTable) {
      build_pair_table();
      table.lane_address = (shared & 0xFF000000u) + threadIdx.x % 32 * 4;
    } else if constexpr (Codes::kTable) {
      const uint4 low = load_shared_16(shared + p.codebook_at);
      const uint4 high = load_shared_16(shared + p.codebook_at + kCodebookSize);
      table.low[0] = low.x, table.low[1] = low.y, table.low[2] = low.z, table.low[3] = low.w;
      table.high[0] = high.x, table.high[1] = high.y, table.high[2] = high.z, table.high[3] = high.w;
    }
    return table;
  }

  // ---- copies

  // Before anything else, by the thread that copies: its barriers, and the first chunks; without x if that may still be
  // written by the kernel before.
  __device__ __forceinline__ int start() const {
    prefetch(arguments.codes);
    prefetch(arguments.scales);
    prefetch(arguments.x);
    if (p.zero_bytes != 0) prefetch(arguments.zeros);
    const Tile tile = tile_at(first_tile);
    const int ahead = min(min(p.stages, kStartChunks), chunks);
    for (int i = 0; i < ahead; ++i) {
      Barrier::init(full + i, 1);
      cutlass::arch::fence_barrier_init();
      copy_weights(tile, i, i);
      if (!p.programmatic_launch) copy_x(tile, i, i);
    }
    for (int i = ahead; i < p.stages; ++i) Barrier::init(full + i, 1);
    for (int i = 0; i < p.stages; ++i) {
      Barrier::init(resolved + i, kResolveWarps);
      Barrier::init(empty + i, p.slabs_per_cta / C::kRowTiles * 4);
    }
    cutlass::arch::fence_barrier_init();
    return ahead;
  }

  __device__ __forceinline__ void copy(int ahead) {
    const bool copies = ahead > 0;
    RingPosition at;
    for (int index = first_tile; index < tiles(); index += p.clusters) {
      if (copies) {
        const Tile tile = tile_at(index);
        int chunk = 0;
        if (index == first_tile) {
          wait_for_previous_kernel();
          for (; chunk < ahead; ++chunk, at.advance(p.stages)) {
            if (p.programmatic_launch) copy_x(tile, chunk, at.stage);
          }
        }
        for (; chunk < chunks; ++chunk, at.advance(p.stages)) {
          Barrier::wait(empty + at.stage, at.phase ^ 1);
          copy_weights(tile, chunk, at.stage);
          copy_x(tile, chunk, at.stage);
        }
      }
      skip_sums();
    }
  }

  // Takes part in the barriers of share_sums and finish_tile.
  __device__ __forceinline__ void skip_sums() const {
    __syncwarp();
    if (p.cluster > 1) {
      cluster_wait_for_all();
      cluster_wait_for_all();
    }
  }

  static constexpr uint64_t kHint = uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL);

  __device__ __forceinline__ void copy_weights(Tile tile, int chunk, int stage) const {
    const uint32_t to = p.ring_at + stage * p.stage_bytes;
    Barrier::arrive_and_expect_tx(full + stage, p.copy_bytes);
    const int slab = first_slab(tile);
    const int group = (chunk0 + chunk) >> p.group_shift;  // of a chunk's groups
    cute::SM90_TMA_LOAD_3D::copy(&arguments.codes, full + stage, kHint, memory + to + p.codes_at, 0,
                                 (chunk0 + chunk) * C::kBlocks, slab);
    load(arguments.scales, to + p.scales_at, group * p.group_scale_pieces, slab, stage);
    if (p.zero_bytes != 0) load(arguments.zeros, to + p.zeros_at, group * p.group_zero_pieces, slab, stage);
  }

  __device__ __forceinline__ void load(const CUtensorMap& map, uint32_t to, int column, int row, int stage) const {
    cute::SM90_TMA_LOAD_2D::copy(&map, full + stage, kHint, memory + to, column, row);
  }

  __device__ __forceinline__ void copy_x(Tile tile, int chunk, int stage) const {
#pragma unroll
    for (int block = 0; block < C::kBlocks; ++block) {
      const uint32_t to = p.ring_at + stage * p.stage_bytes + block * C::kTokens * kXRowBytes;
      const int k = ((chunk0 + chunk) * C::kBlocks + block) * layout::kBlockK;
      load(arguments.x, to, k, tile.token * p.tile_tokens, stage);
    }
  }

  // ---- scales

  // One of the kResolveThreads threads that share the groups of a stage.
  __device__ __forceinline__ void resolve(int thread) const {
    switch (ScaleType(p.scale_type)) {
      case ScaleType::kFp32:
        return resolve_all<ScaleType::kFp32>(thread);
      case ScaleType::kFp16:
        return resolve_all<ScaleType::kFp16>(thread);
      case ScaleType::kBf16:
        return resolve_all<ScaleType::kBf16>(thread);
      case ScaleType::kE4M4:
        return resolve_all<ScaleType::kE4M4>(thread);
      case ScaleType::kE4M3:
        return resolve_all<ScaleType::kE4M3>(thread);
      case ScaleType::kE8M0:
        return resolve_all<ScaleType::kE8M0>(thread);
      case ScaleType::kNested:
        return resolve_all<ScaleType::kNested>(thread);
    }
  }

  template <ScaleType kType>
  __device__ __forceinline__ void resolve_all(int thread) const {
    using Resolver = ScaleResolver<Codes, kType>;
    const Resolver resolver(p, shared);
    const int shares = p.slabs_per_cta * p.groups_in_chunk * Resolver::kShares;
    RingPosition at;
    for (int index = first_tile; index < tiles(); index += p.clusters) {
      const int first_row = first_slab(tile_at(index)) * layout::kBlockRows;
      typename Resolver::SecondLevel next{};
      if (thread < shares) resolver.load_second_level(first_row, chunk0, thread, next);
      for (int chunk = 0; chunk < chunks; ++chunk, at.advance(p.stages)) {
        auto second = next;
        if (thread < shares && chunk + 1 < chunks) {
          resolver.load_second_level(first_row, chunk0 + chunk + 1, thread, next);
        }
        Barrier::wait(full + at.stage, at.phase);
        const uint32_t stage = shared + p.ring_at + at.stage * p.stage_bytes;
        for (int share = thread; share < shares; share += kResolveThreads) {
          if (share != thread) resolver.load_second_level(first_row, chunk0 + chunk, share, second);
          resolver.resolve(stage, share, second);
        }
        __syncwarp();
        if (thread % 32 == 0) Barrier::arrive(resolved + at.stage);
      }
      skip_sums();
    }
  }

  // ---- the main loop

  struct Sums {
    float v[C::kRowTiles][C::kSums];
  };

  __device__ __forceinline__ void multiply(int warpgroup) {
    const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32 % 4, 0);
    const int lane = threadIdx.x % 32;
    const typename Codes::Table table = load_table();
    wait_for_previous_kernel();
    int k_warpgroup = 0, row_warpgroup = warpgroup;
    if constexpr (C::kSplitsK) {
      k_warpgroup = warpgroup / p.slabs_per_cta;
      row_warpgroup = warpgroup % p.slabs_per_cta;
    }
    RingPosition at;
    at.stage = k_warpgroup;
    for (int index = first_tile; index < tiles(); index += p.clusters) {
      const Tile tile = tile_at(index);
      Sums sums;
      multiply_tile(row_warpgroup * C::kRowTiles, k_warpgroup, warp, lane, table, at, sums);
      finish_tile(tile, row_warpgroup, k_warpgroup, warp, lane, sums);
    }
  }

  __device__ __forceinline__ int row_warpgroups() const { return p.slabs_per_cta / C::kRowTiles; }

  // A barrier of a stage, as the loop addresses it.
  static constexpr uint32_t kResolvedBarriers = kMaxStages * 8;
  static constexpr uint32_t kEmptyBarriers = 2 * kMaxStages * 8;

  __device__ __forceinline__ static void wait(uint32_t barrier, uint32_t phase) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(barrier),
        "r"(phase)
        : "memory");
  }

  // By every warp that has read a stage.
  __device__ __forceinline__ static void release(uint32_t barriers, int stage, int lane) {
    if (lane == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barriers + stage * 8) : "memory");
  }

  // The B operand of a block's first k16 step; the next ones lie 32 bytes further each.
  __device__ __forceinline__ cute::GmmaDescriptor descriptor(uint32_t x) const {
    cute::GmmaDescriptor d;
    d.desc_ = 0;
    d.bitfield.start_address_ = uint16_t((x & 0x3FFFF) >> 4);
    d.bitfield.leading_byte_offset_ = 1;
    d.bitfield.stride_byte_offset_ = 8 * kXRowBytes >> 4;
    d.bitfield.layout_type_ = uint8_t(cute::SM90::GMMA::LayoutType::B128);
    return d;
  }

  // With `accumulate` false the sums start anew.
  __device__ __forceinline__ static void issue(float (&sums)[C::kSums], const uint32_t (&a)[4], uint64_t b,
                                               bool accumulate) {
    const uint64_t descriptor[1] = {b};
    const cute::SM90::GMMA::ScaleOut scale[1] = {accumulate ? cute::SM90::GMMA::ScaleOut::One
                                                            : cute::SM90::GMMA::ScaleOut::Zero};
    cute::detail::explode(C::Atom::fma, a, cute::make_int_sequence<4>{}, descriptor, cute::make_int_sequence<1>{}, sums,
                          cute::make_int_sequence<C::kSums>{}, scale, cute::seq<0>{});
  }

  __device__ __forceinline__ static void repeat(uint32_t pair, uint32_t (&twice)[2]) {
    twice[0] = __byte_perm(pair, 0, 0x1010);
    twice[1] = __byte_perm(pair, 0, 0x3232);
  }

  // `slab0`: the warpgroup's first slab in the CTA. It multiplies the chunks k_warpgroup, k_warpgroup + k_warpgroups,
  // ...
  __device__ __forceinline__ void multiply_tile(int slab0, int k_warpgroup, int warp, int lane,
                                                const typename Codes::Table& table, RingPosition& at,
                                                Sums& sums) const {
    // In a stage: this lane's codes, and the scales of its rows g and g + 8, which lie side by side.
    uint32_t codes_at = p.codes_at + slab0 * C::kBlocks * kBlockBytes + warp * kAtomBytes + lane * 16;
    constexpr uint32_t kGroupBytes = layout::kBlockRows * 2;
    const uint32_t slab_scales = p.groups_in_chunk * kGroupBytes;
    const uint32_t scales_at = p.resolved_at + slab0 * slab_scales + ((lane >> 2) * 8 + 2 * warp) * 2;
    const int group_shift = 31 - __clz(p.group_steps);
    const uint32_t barriers = shared + p.barriers_at + kResolvedBarriers;
    uint32_t empty_barriers = shared + p.barriers_at + kEmptyBarriers;
    // Kept: nvcc would read parameters anew in the loop, and wait for them.
    asm volatile("" : "+r"(codes_at), "+r"(empty_barriers));
    const uint32_t ring = shared + p.ring_at;
    uint32_t stage = ring + at.stage * p.stage_bytes;
    uint4 w, next_w;             // codes of the block that is decoded, and of the next one
    uint32_t pair, second_pair;  // the next one's scales, and zeros or what the scales lack
    Scale scale;
    uint32_t a[2][C::kSteps][4];  // operands of the MMAs in flight, and of the next ones
    // A chunk is walked slab by slab; `step` counts the k16 steps of a slab's chunk.
    const auto fetch_scale = [&](int r, int step) __attribute__((always_inline)) {
      const uint32_t from = stage + scales_at + r * slab_scales + (step >> group_shift) * kGroupBytes;
      pair = load_shared_4(from);
      second_pair = load_shared_4(from + p.resolved_bytes);
      if constexpr (!Codes::kTable) {
        if (Codes::kFine && p.has_rest) {
          repeat(load_shared_4(from + 2 * p.resolved_bytes), scale.zero_rest);
          repeat(load_shared_4(from + 3 * p.resolved_bytes), scale.scale_rest);
        }
      }
    };
    const auto fetch = [&](int r, int block) __attribute__((always_inline)) {
      next_w = load_shared_16(stage + codes_at + (r * C::kBlocks + block) * kBlockBytes);
      fetch_scale(r, block * layout::kSteps);
    };
    const auto take_scale = [&]() __attribute__((always_inline)) {
      repeat(pair, scale.scale);
      if constexpr (Codes::kTable) {
        repeat(second_pair, scale.scale_rest);
      } else {
        repeat(second_pair, scale.zero);
      }
    };
    const auto take_next = [&]() __attribute__((always_inline)) {
      w = next_w;
      take_scale();
    };
    const auto decode_step = [&](int r, int step, uint32_t word, uint32_t (&to)[4]) __attribute__((always_inline)) {
      if (Codes::kFine && step % layout::kSteps != 0 && (step & (p.group_steps - 1)) == 0) {  // groups of 16 and 32
        fetch_scale(r, step);
        take_scale();
      }
      Codes::decode(word, table, scale, p.has_rest, to);
    };
    // A chunk is multiplied in groups of MMAs, `kParts` a block.
    constexpr int kParts = layout::kSteps / C::kSteps;
    constexpr int kChunkBlocks = C::kBlocks * C::kRowTiles;
    const auto fetch_block = [&](int i) __attribute__((always_inline)) { fetch(i / C::kBlocks, i % C::kBlocks); };
    const auto decode = [&](int group) __attribute__((always_inline)) {
      const int part = group % kParts, block = group / kParts % C::kBlocks, r = group / kParts / C::kBlocks;
      if (part == 0) take_next();
      const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int i = 0; i < C::kSteps; ++i) {
        const int step = part * C::kSteps + i;
        decode_step(r, block * layout::kSteps + step, words[step], a[group % 2][i]);
      }
    };

    wait(barriers + at.stage * 8, at.phase);
    fetch_block(0);
    decode(0);
    int left = (chunks - k_warpgroup + p.k_warpgroups - 1) / p.k_warpgroups;  // at least one
    int previous = 0;                                                         // stage
    bool first = true;
#pragma unroll 1
    do {
      constexpr int kGroups = kParts * kChunkBlocks;
      const cute::GmmaDescriptor x = descriptor(stage);
      const int current = at.stage;
      const bool more = left > 1;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const int part = group % kParts;
        const int block = group / kParts % C::kBlocks;
        const int r = group / kParts / C::kBlocks;
        cute::warpgroup_arrive();
#pragma unroll
        for (int i = 0; i < C::kSteps; ++i) {
          const int step = part * C::kSteps + i;
          cute::GmmaDescriptor b = x;
          b.reg32_[0] += block * C::kTokens * kXRowBytes / 16 + step * (layout::kStepK * 2 / 16);
          issue(sums.v[r], a[group % 2][i], b.desc_, !first || block > 0 || step > 0);
        }
        cute::warpgroup_commit_batch();
        // While a block is multiplied, the next block's codes are on their way; where groups change within a block, its
        // second half still reads scales of its own.
        if (part == (Codes::kFine ? kParts - 1 : 0)) {
          const int next = group / kParts + 1;
          if (next < kChunkBlocks) {
            // Always true: behind a branch nvcc does not mix loads, and decoding that waits for them, with the MMAs
            // above, which would wait too (8192 x 8192, M = 64, nf4: 24.4 instead of 24.0 us; H200, 2026-11-21).
            if (p.stages > 0) fetch_block(next);
          } else {
            at.advance(p.stages, p.k_warpgroups);
            stage = ring + at.stage * p.stage_bytes;
            if (more) {
              wait(barriers + at.stage * 8, at.phase);
              fetch_block(0);
            }
          }
        }
        cute::warpgroup_wait<1>();
        if (group == 0 && !first) release(empty_barriers, previous, lane);
        if (group + 1 < kGroups) {
          decode(group + 1);
        } else if (more) {
          decode(0);
        }
      }
      previous = current;
      first = false;
    } while (--left > 0);
    cute::warpgroup_wait<0>();
    // The compiler does not know that only now the sums are there: where paths part behind the loop it copied them
    // before the wait, without the last MMAs.
#pragma unroll
    for (int r = 0; r < C::kRowTiles; ++r)
#pragma unroll
      for (int i = 0; i < C::kSums; ++i) cute::warpgroup_fence_operand(sums.v[r][i]);
    release(empty_barriers, previous, lane);
  }

  // ---- sums

  __device__ __forceinline__ static float4 load_remote_float4(uint32_t address, int rank) {
    float4 v;
    asm volatile(
        "{\n"
        ".reg .b32 from;\n"
        "mapa.shared::cluster.u32 from, %4, %5;\n"
        "ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [from];\n"
        "}"
        : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
        : "r"(address), "r"(rank)
        : "memory");
    return v;
  }

  static constexpr int kQuads = C::kSums / 4;  // of 8 tokens, of a lane and slab

  // Where a warpgroup leaves its sums: in the ring, as its lanes hold them.
  __device__ __forceinline__ uint32_t sums_at(int warpgroup) const {
    return shared + p.ring_at +
           (warpgroup * C::kRowTiles * kQuads * kWarpgroupThreads + threadIdx.x % kWarpgroupThreads) * 16;
  }

  // Leaves this warpgroup's sums, and waits for those of all others that have the same tile.
  __device__ __forceinline__ void share_sums(int warpgroup, const Sums& sums) const {
    sync_warps(kSumsBarrier, multiplying_threads());  // nobody reads the ring any more
    const uint32_t to = sums_at(warpgroup);
#pragma unroll
    for (int r = 0; r < C::kRowTiles; ++r)
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        const float* v = sums.v[r] + 4 * q;
        store_shared_16(
            to + (r * kQuads + q) * kWarpgroupThreads * 16,
            make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])));
      }
    if (p.cluster > 1) {
      cute::cluster_arrive();
      cute::cluster_wait();
    } else {
      sync_warps(kSumsBarrier, multiplying_threads());
    }
  }

  using UnitSums = cutlass::Array<float, 8>;  // of a lane: 16 tokens x 64 rows

  // A unit's sums over all sources, in the order of K's warpgroups, and of the CTAs within them.
  __device__ __forceinline__ UnitSums add_sources(int row_warpgroup, int r, int unit) const {
    constexpr int kAtOnce = 2;  // of which loads are in flight
    const uint32_t step = row_warpgroups() * C::kRowTiles * kQuads * kWarpgroupThreads * 16;
    uint32_t from = sums_at(row_warpgroup) + (r * kQuads + 2 * unit) * kWarpgroupThreads * 16;
    int rank = 0;
    UnitSums sums;
    sums.fill(0);
#pragma unroll 1
    for (int left = p.sources; left > 0; left -= kAtOnce) {
      float4 v[kAtOnce][2];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (i >= left) break;
        v[i][0] = load_remote_float4(from, rank);
        v[i][1] = load_remote_float4(from + kWarpgroupThreads * 16, rank);
        if (++rank == p.cluster) {
          rank = 0;
          from += step;
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (i >= left) break;
        const float values[8] = {v[i][0].x, v[i][0].y, v[i][0].z, v[i][0].w,
                                 v[i][1].x, v[i][1].y, v[i][1].z, v[i][1].w};
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[j] += values[j];
      }
    }
    return sums;
  }

  // Every source finishes its share of the units.
  __device__ __forceinline__ void finish_tile(Tile tile, int row_warpgroup, int k_warpgroup, int warp, int lane,
                                              const Sums& sums) const {
    // Behind the tile's own tokens the MMAs multiply whatever the ring held.
    const int first_token = tile.token * p.tile_tokens, end_token = min(first_token + p.tile_tokens, p.m);
    const uint32_t units = p.units_of_first_source << (part + k_warpgroup * p.cluster);
    const int warpgroup = k_warpgroup * row_warpgroups() + row_warpgroup;
    uint8_t* output = memory + p.output_at + warpgroup * C::kOutputBytes + warp * (C::kOutputBytes / 4);
    Epilogue<typename C::Atom, typename C::Value, C::kTokens> epilogue(p, Codes::kOutputFactor);
    const int first_slab_of_mine = first_slab(tile) + row_warpgroup * C::kRowTiles;
    const auto visitor_of = [&](int slab) __attribute__((always_inline)) {
      return epilogue.visitor(p.n, end_token - first_token, slab, threadIdx.x % kWarpgroupThreads);
    };
    const auto first_visitor = visitor_of(first_slab_of_mine);  // loads the bias before the others' sums are waited for
    if (p.sources > 1) share_sums(warpgroup, sums);
#pragma unroll
    for (int r = 0; r < C::kRowTiles; ++r) {
      const int slab = first_slab_of_mine + r;
      auto visitor = r == 0 ? first_visitor : visitor_of(slab);
#pragma unroll
      for (int first_unit = 0; first_unit < C::kUnits; first_unit += C::kUnitsAtOnce) {
        if (first_token + first_unit * kUnitTokens >= end_token) break;
#pragma unroll
        for (int u = 0; u < C::kUnitsAtOnce; ++u) {
          const int unit = first_unit + u;
          if (!(units >> unit & 1)) continue;
          const auto values = visitor.visit(
              p.sources > 1 ? add_sources(row_warpgroup, r, unit) : reinterpret_cast<const UnitSums*>(sums.v[r])[unit],
              unit, 0, 0);
          const auto* pairs = reinterpret_cast<const uint32_t*>(&values);
          // Matrix lane / 8 has 8 tokens of the rows g (even) or g + 8.
          cute::SM90_U16x8_STSM_T::copy(pairs[0], pairs[1], pairs[2], pairs[3],
                                        piece_of(output, u, (lane >> 4) * 8 + (lane & 7), lane >> 3 & 1));
        }
        __syncwarp();
#pragma unroll
        for (int u = 0; u < C::kUnitsAtOnce; ++u) {
          const int unit = first_unit + u;
          if (!(units >> unit & 1)) continue;
          store_unit(output, u, first_token + unit * kUnitTokens, end_token,
                     slab * layout::kBlockRows + warp * layout::kAtomRows, lane);
        }
        __syncwarp();
      }
    }
    if (p.cluster > 1) {        // everyone has read this CTA's sums
      cute::tma_store_fence();  // the next copies into the ring come from another proxy
      cluster_wait_for_all();
    }
  }

  // Eight of a warp's rows of a token of the u-th unit. Eight tokens' pieces fall on different banks.
  __device__ __forceinline__ static cute::uint128_t& piece_of(uint8_t* output, int u, int token, int half) {
    return reinterpret_cast<cute::uint128_t*>(output + u * kUnitBytes)[token * 2 + (half ^ (token >> 2 & 1))];
  }

  // A warp's 16 rows of the tokens of a unit. Where rows of y are not aligned, neighbouring lanes store neighbouring
  // values: with eight of them a lane 50257 x 768 at M = 512 took five times as long as 50256 (H200, 2026-11-21).
  __device__ __forceinline__ void store_unit(uint8_t* output, int u, int first_token, int end_token, int first_row,
                                             int lane) const {
    uint16_t* y = static_cast<uint16_t*>(p.y);
    if (p.y_vector) {
      const int token = first_token + lane / 2, row = first_row + lane % 2 * 8;
      if (token < end_token && row < p.n) {
        *reinterpret_cast<cute::uint128_t*>(y + token * p.ldy + row) = piece_of(output, u, lane / 2, lane % 2);
      }
      return;
    }
    constexpr int kRows = layout::kAtomRows, kTokensAtOnce = cutlass::NumThreadsPerWarp / kRows;
    const int of_row = lane % kRows, row = first_row + of_row;
#pragma unroll 2
    for (int i = 0; i < kUnitTokens; i += kTokensAtOnce) {
      const int of_token = i + lane / kRows, token = first_token + of_token;
      if (token >= end_token || row >= p.n) continue;
      const auto* piece = reinterpret_cast<const uint16_t*>(&piece_of(output, u, of_token, of_row / 8));
      y[token * p.ldy + row] = piece[of_row % 8];
    }
  }
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) wgmma_kernel(const __grid_constant__ Arguments arguments) {
#ifdef CUTE_ARCH_MMA_SM90A_ENABLED
  extern __shared__ __align__(kSharedAlignment) uint8_t shared[];
  Kernel<C>(arguments, shared).run();
#endif
}

}  // namespace cutlass_ext::cuda::wgmma
