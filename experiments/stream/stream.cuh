// Family `stream`: y[M, N] = x[M, K] W[N, K]^T (+ bias) for M <= 16, 4-bit W, weights read once at HBM speed.
//
// Work.   A tile is `row_warps * kAtoms` atoms (16 rows each); a cluster of `cluster` CTAs owns a contiguous run of
//         tiles and each CTA of it 1 / cluster of K. Inside a CTA a warp owns `kAtoms` atoms of the tile and
//         1 / k_warps of the CTA's K: nothing is shared between warps until the tile's sums are added.
// Weights stream through a ring of kStages stages private to a warp; a stage is one 64-k block of the warp's atoms
//         and its scales as stored. All stages are requested before anything else, and before the grid dependency.
// Decode  weights are the A operand of mma.sync.m16n8k16, tokens its n. Integers: w | magic is magic + code, the offset
//         comes off through C = -offset * sum(x), itself one MMA shared by all atoms. Codebooks: one byte of two codes
//         indexes a table of value pairs in shared memory, a copy for every bank.
// Scales  any type becomes fp32 in shared memory once per stage, two rows a lane; they multiply the fp32 sums of a group.
// Sums    of a tile meet in shared memory in the order of the warps, then of the CTAs of the cluster: same bits always.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "kernels/format.hpp"

namespace cutlass_ext::stream {

struct Params {
  const uint8_t* codes;
  const uint8_t* scales;
  const uint8_t* zeros;
  const float* codebook;
  const float* nested_map;
  const float* nested_absmax;
  const void* x;
  void* y;
  const void* bias;
  int64_t ldx, ldy;
  uint32_t slab_units;        // codes of a slab, in 16 bytes
  uint32_t slab_scale_units;  // scales of a slab, in 16 bytes
  uint32_t slab_zero_units;
  float nested_offset, tensor_scale, code_bias;
  int m, n, k;
  int k_blocks;
  int group_shift;            // log2(blocks of a group), 31: one group
  int groups;                 // of a row, unpadded (nested)
  int scale_type, zero_type;  // ScaleType, ZeroType
  int scale_size, zero_size;  // bytes
  int atoms, slabs;
  // Launch.
  int tiles, cluster, cluster_log2, k_warps_log2, row_warps, clusters;
  int tiles_each, tiles_extra;  // of a cluster; the first tiles_extra clusters have one more
  int x_blocks;               // k blocks of x a warp column holds in shared memory
  int x_pitch;                // bytes between tokens
  int x_vector;               // rows of x start on 16 bytes and K is a multiple of 8
  int stage_bytes, ring_bytes, red_stride;  // of a warp
  int off_ring, off_sums, off_resolved, off_red, off_x, off_exchange, off_bars;  // absolute shared addresses
  int pdl;
};

constexpr int kSmemBase = 1024;  // absolute shared address of everything: dynamic shared memory starts at or below it
constexpr int kMaxWarps = 16;

// ---- PTX ----
__device__ __forceinline__ void cp_async16(uint32_t dst, const void* src) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}
__device__ __forceinline__ void cp_async16_fill(uint32_t dst, const void* src, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void cp_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
__device__ __forceinline__ uint4 lds128(uint32_t a) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a) : "memory");
  return v;
}
__device__ __forceinline__ float2 lds_f2(uint32_t a) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(a) : "memory");
  return v;
}
__device__ __forceinline__ float lds_f(uint32_t a) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(a) : "memory");
  return v;
}
__device__ __forceinline__ uint32_t lds_u32(uint32_t a) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(a) : "memory");
  return v;
}
__device__ __forceinline__ uint32_t lds_u16(uint32_t a) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(a) : "memory");
  return v;
}
__device__ __forceinline__ void sts128(uint32_t a, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(a), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void sts_f2(uint32_t a, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(a), "f"(x), "f"(y) : "memory");
}
__device__ __forceinline__ void sts_f(uint32_t a, float x) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(a), "f"(x) : "memory"); }
__device__ __forceinline__ void ldsm4(uint32_t a, uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3) : "r"(a) : "memory");
}
// The table never changes once built: not volatile, so that the compiler may schedule the lookups.
__device__ __forceinline__ uint32_t lut_load(uint32_t a) {
  uint32_t v;
  asm("ld.shared.u32 %0, [%1+%2];" : "=r"(v) : "r"(a), "n"(kSmemBase));
  return v;
}
template <int kByte>
__device__ __forceinline__ uint32_t lut_address(uint32_t w, uint32_t lane4) {
  uint32_t a;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(a) : "r"(w), "r"(lane4), "n"(0x7604 | (kByte << 4)));
  return a;
}
template <uint32_t kMask, uint32_t kOr>
__device__ __forceinline__ uint32_t and_or(uint32_t w) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(w), "n"(kMask), "n"(kOr));
  return r;
}
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}
__device__ __forceinline__ void bar_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

__device__ __forceinline__ void grid_dependency_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
__device__ __forceinline__ int cluster_rank() {
  uint32_t r = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
#endif
  return int(r);
}
__device__ __forceinline__ void sts_f_remote(uint32_t a, int rank, float v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{.reg .b32 t; mapa.shared::cluster.u32 t, %0, %1; st.shared::cluster.f32 [t], %2;}" ::"r"(a), "r"(rank), "f"(v) : "memory");
#endif
}
__device__ __forceinline__ void mbar_init(uint32_t a, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(a), "r"(count) : "memory");
}
__device__ __forceinline__ void mbar_fence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void mbar_expect(uint32_t a, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(a), "r"(bytes) : "memory");
#endif
}
__device__ __forceinline__ void mbar_wait(uint32_t a, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{.reg .pred p; W: mbarrier.try_wait.parity.shared.b64 p, [%0], %1; @!p bra W; }" ::"r"(a), "r"(parity) : "memory");
#endif
}
__device__ __forceinline__ void bulk_copy(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst), "l"(src), "r"(bytes), "r"(bar) : "memory");
#endif
}

// ---- scales ----
__device__ __forceinline__ float byte_scale(uint32_t b, int type) {
  if (type == int(ScaleType::kE4M4)) return __uint_as_float(b << 19) * 0x1p116f;
  if (type == int(ScaleType::kE4M3)) {
    const float v = (b & 0x7F) == 0x7F ? __uint_as_float(0x7FC00000u) : __uint_as_float((b & 0x7F) << 20) * 0x1p120f;
    return b & 0x80 ? -v : v;
  }
  return __uint_as_float(b == 0 ? 0x00400000u : b == 255 ? 0x7FC00000u : b << 23);  // E8M0
}

// Two neighbouring values (rows r and r + 8) at a shared address.
__device__ __forceinline__ float2 load_pair(uint32_t a, int type, int size) {
  if (size == 2) {
    const uint32_t v = lds_u32(a);
    if (type == int(ScaleType::kFp16)) return __half22float2(*reinterpret_cast<const __half2*>(&v));
    return {__uint_as_float(v << 16), __uint_as_float(v & 0xFFFF0000u)};
  }
  if (size == 4) return lds_f2(a);
  const uint32_t v = lds_u16(a);
  return {byte_scale(v & 255, type), byte_scale(v >> 8, type)};
}

template <class T>
__device__ __forceinline__ float to_float(T v) { return float(v); }

template <class T>
__device__ __forceinline__ uint32_t pack2(float lo, float hi) {
  const T a = T(lo), b = T(hi);
  return uint32_t(*reinterpret_cast<const uint16_t*>(&a)) | uint32_t(*reinterpret_cast<const uint16_t*>(&b)) << 16;
}

// ---- the kernel ----
// kAtoms     atoms (16 rows) of a warp: 1, 2, 3, 4
// kTokens8   n8 tiles: 1 (M <= 8), 2 (M <= 16)
// kGroups    groups in a 64-k block: 1 (group >= 64), 2, 4
// How scales are read. kAny: converted in shared memory, type known at run time; needed with zeros.
enum class Scales { kFp32, kFp16, kBf16, kAny, kNested };

template <class T_, bool kCodebook_, int kAtoms_, int kTokens8_, int kGroups_, int kStages_, bool kBulk_, Scales kScales_ = Scales::kBf16, bool kZeros_ = false, bool kXRing_ = false>
struct Config {
  using T = T_;
  static constexpr bool kCodebook = kCodebook_, kZeros = kZeros_, kBulk = kBulk_;
  static constexpr Scales kScales = kScales_;
  static constexpr bool kXRing = kXRing_;  // x travels in the stages instead of lying there whole
  static_assert(!(kBulk && kXRing));
  static constexpr bool kNested = kScales == Scales::kNested;
  static constexpr bool kDirect = !kZeros && kScales <= Scales::kBf16;  // read from the ring as they are
  static constexpr int kAtoms = kAtoms_, kTokens8 = kTokens8_, kGroups = kGroups_, kStages = kStages_;
  static constexpr int kSets = kAtoms == 3 ? 2 : 1;  // slabs a warp's atoms may touch
  static constexpr int kRows = 16 * kAtoms;
  static constexpr int kRowsPow2 = kAtoms == 3 ? 64 : kRows;
  static constexpr int kRedPitch = (kRows + 4) * 4;  // bytes; 2t * pitch puts the four t of a store on different banks
};

template <class C>
__global__ void __launch_bounds__(kMaxWarps * 32, 1) kernel(const __grid_constant__ Params p) {
  using T = typename C::T;
  constexpr int R = C::kAtoms, MT = C::kTokens8, G = C::kGroups, S = C::kStages;
  constexpr int kStepsPerGroup = 4 / G;
  constexpr int kScaleSize = C::kScales == Scales::kFp32 ? 4 : 2;  // of direct scales
  constexpr bool kFp16 = std::is_same_v<T, __half>;
  const int tid = threadIdx.x, lane = tid & 31;
  const int warp = __shfl_sync(0xFFFFFFFFu, tid >> 5, 0);
  const int k_warps = 1 << p.k_warps_log2;
  const int wk = warp & (k_warps - 1), wr = warp >> p.k_warps_log2;
  const int threads = blockDim.x;
  const int rank = p.cluster > 1 ? cluster_rank() : 0;
  const int cluster_id = int(blockIdx.x) >> p.cluster_log2;

  if (p.pdl) grid_dependency_launch();
  if (p.cluster > 1) cluster_arrive_relaxed();

  // This warp's share: tiles [tile0, tile1), k blocks [kb0, kb1).
  const int tile0 = cluster_id * p.tiles_each + min(cluster_id, p.tiles_extra);
  const int tile1 = tile0 + p.tiles_each + (cluster_id < p.tiles_extra ? 1 : 0);
  const int parts_log2 = p.cluster_log2 + p.k_warps_log2, part = (rank << p.k_warps_log2) + wk;
  const int kb0 = (part * p.k_blocks) >> parts_log2;
  const int kb1 = ((part + 1) * p.k_blocks) >> parts_log2;
  auto first_atom = [&](int tile) { return min((tile * p.row_warps + wr) * R, R == 3 ? p.atoms : p.atoms - R); };

  // In a cluster a CTA's shared memory starts at its rank << 24 of the cluster's window.
  uint32_t window = 0;
#if __CUDA_ARCH__ >= 900
  window = uint32_t(rank) << 24;
#endif
  const uint32_t ring = window + p.off_ring + warp * p.ring_bytes, ring_end = ring + S * p.stage_bytes;
  const uint32_t resolved = window + p.off_resolved + warp * (G * R * 64 * (C::kZeros ? 2 : 1));
  const uint32_t bars = window + p.off_bars + warp * (S * 8);
  const int set_bytes = G * 64 * (C::kDirect ? kScaleSize : p.scale_size), zero_set_bytes = G * 64 * p.zero_size;

  // ---- x: the row warps of a warp column load its x together ----
  const uint32_t x_region = window + p.off_x + wk * (p.m * p.x_pitch);
  auto load_x = [&](int kb) {
    const int chunks = min(p.x_blocks, kb1 - kb) * 8;
    const T* const x = static_cast<const T*>(p.x);
    if (p.x_vector) {
#pragma unroll 1
      for (int c = lane; c < chunks; c += 32) {
        const int k = kb * 64 + c * 8;
        const T* src = x + (wr * p.ldx + k);
        uint32_t dst = x_region + wr * p.x_pitch + c * 16;
        const int64_t src_step = p.row_warps * p.ldx;
        const int dst_step = p.row_warps * p.x_pitch, bytes = k < p.k ? 16 : 0;
        if (bytes == 0) src = x;
#pragma unroll 4
        for (int t = wr; t < p.m; t += p.row_warps) {
          cp_async16_fill(dst, src, bytes);
          src += bytes ? src_step : 0;
          dst += dst_step;
        }
      }
    } else {
#pragma unroll 1
      for (int t = wr; t < p.m; t += p.row_warps) {
        const uint16_t* const src = reinterpret_cast<const uint16_t*>(x + int64_t(t) * p.ldx);
#pragma unroll 1
        for (int c = lane; c < chunks * 4; c += 32) {
          const int k = kb * 64 + c * 2;
          const uint32_t lo = k < p.k ? src[k] : 0, hi = k + 1 < p.k ? src[k + 1] : 0;
          asm volatile("st.shared.u32 [%0], %1;" ::"r"(x_region + t * p.x_pitch + c * 4), "r"(lo | hi << 16) : "memory");
        }
      }
    }
    cp_commit();
  };
  float cb_lo = 0, cb_hi = 0;
  float map_value = 0;
  if constexpr (C::kCodebook) {
    cb_lo = __ldg(p.codebook + ((tid >> 1) & 15));
    cb_hi = __ldg(p.codebook + ((tid >> 5) & 15));
    if (C::kNested && tid < 256) map_value = __ldg(p.nested_map + tid);
  }
  // Weights may be requested before the grid dependency, x may not. Without one x goes first: it would wait behind the
  // weights, and nothing starts without it.
  if (!C::kBulk && !C::kXRing && !p.pdl) load_x(kb0);

  // Bulk: x of the CTA's k lies token by token; warp t copies token t.
  const uint32_t x_bar = window + p.off_bars + (blockDim.x >> 5) * (S * 8);
  const int cta_kb0 = ((rank << p.k_warps_log2) * p.k_blocks) >> parts_log2;
  auto bulk_x = [&]() {
    if constexpr (C::kBulk) {
      if (warp < p.m && lane == 0) {
        const int cta_kb1 = (((rank + 1) << p.k_warps_log2) * p.k_blocks) >> parts_log2;
        const uint32_t bytes = uint32_t(min(cta_kb1 * 64, p.k) - cta_kb0 * 64) * 2;
        mbar_expect(x_bar, bytes);
        bulk_copy(window + p.off_x + warp * p.x_pitch, static_cast<const T*>(p.x) + (warp * p.ldx + cta_kb0 * 64), bytes, x_bar);
      }
      __syncwarp();
    }
  };
  if constexpr (C::kBulk) {
    if (lane == 0) {
#pragma unroll
      for (int s = 0; s < S; ++s) mbar_init(bars + s * 8, 1);
      if (warp == 0) mbar_init(x_bar, p.m);
      mbar_fence();
    }
    if ((p.k & 63) != 0 && part + 1 == 1 << parts_log2 && wr == 0) {  // zeros behind K
      const int tail = 64 - (p.k & 63);
      for (int i = lane; i < tail * p.m; i += 32) {
        const int t = i / tail;
        asm volatile("st.shared.u16 [%0], %1;" ::"r"(window + p.off_x + t * p.x_pitch + (p.k - cta_kb0 * 64 + i - t * tail) * 2), "h"(uint16_t(0)) : "memory");
      }
    }
    __syncthreads();
    if (!p.pdl) bulk_x();
  }

  // ---- producer: requests the stages in the order they are used; positions in units of 16 bytes ----
  int p_tile = tile0, p_kb = kb0;
  uint32_t p_code = 0, p_scale = 0, p_zero = 0;
  int p_delta1 = 32, p_delta2 = 64;  // R == 3: where atoms 1 and 2 stand
  uint32_t p_second = 0, p_zero_second = 0;  // and the scales of the second slab
  const uint32_t set_units = set_bytes / 16, zero_set_units = zero_set_bytes / 16;
  auto at16 = [](const uint8_t* base, uint32_t units) { return base + uint64_t(units) * 16; };
  auto producer_tile = [&]() {
    const int a = first_atom(p_tile);
    if constexpr (R == 3) {
      const int last = p.atoms - 1;
      auto where = [&](int atom) { return uint32_t(atom >> 2) * p.slab_units + (atom & 3) * 32; };
      const int b0 = min(a, last), b1 = min(a + 1, last), b2 = min(a + 2, last);
      p_code = where(b0);
      p_delta1 = int(where(b1) - p_code);
      p_delta2 = int(where(b2) - p_code);
      const bool two = (b2 >> 2) != (b0 >> 2);
      p_second = two ? p.slab_scale_units : 0;
      if constexpr (C::kZeros) p_zero_second = two ? p.slab_zero_units : 0;
      p_scale = uint32_t(b0 >> 2) * p.slab_scale_units;
      if constexpr (C::kZeros) p_zero = uint32_t(b0 >> 2) * p.slab_zero_units;
    } else {
      p_code = uint32_t(a >> 2) * p.slab_units + (a & 3) * 32;
      p_scale = uint32_t(a >> 2) * p.slab_scale_units;
      if constexpr (C::kZeros) p_zero = uint32_t(a >> 2) * p.slab_zero_units;
    }
    p_code += uint32_t(kb0) * 128 + (C::kBulk ? 0 : lane);
  };
  // Lanes copy 16 bytes each; with one group a set is 256 bytes at most, half a warp's.
  auto copy_sets = [&](uint32_t dst, const uint8_t* base, uint32_t at, uint32_t second, uint32_t units) {
    if constexpr (G == 1) {
      const bool upper = C::kSets == 2 && lane >= 16;
      const uint32_t c = C::kSets == 2 ? lane & 15 : lane;
      if (c < units) cp_async16(dst + ((upper ? units : 0) + c) * 16, at16(base, at + (upper ? second : 0) + c));
    } else {
#pragma unroll 1
      for (uint32_t c = lane; c < C::kSets * units; c += 32) {
        const bool upper = C::kSets == 2 && c >= units;
        cp_async16(dst + c * 16, at16(base, at + (upper ? second + (c - units) : c)));
      }
    }
  };
  // x in the stages: [token][64 k], 16 bytes of padding; lane l copies chunk l % 8 of tokens l / 8 + 4i.
  constexpr int kXPitch = 144;
  const uint32_t stage_x = R * 512 + C::kSets * (set_bytes + (C::kZeros ? zero_set_bytes : 0));
  const T* const x_lane = static_cast<const T*>(p.x) + ((lane >> 3) * p.ldx + (lane & 7) * 8);
  auto issue_x = [&](uint32_t stage, int kb) {
    const bool inside = kb * 64 + (lane & 7) * 8 < p.k;
    const T* src = inside ? x_lane + kb * 64 : static_cast<const T*>(p.x);
    const int64_t step = inside ? 4 * p.ldx : 0;
    const uint32_t dst = stage + stage_x + (lane >> 3) * kXPitch + (lane & 7) * 16;
#pragma unroll
    for (int i = 0; i < 2 * MT; ++i) {
      if ((lane >> 3) + 4 * i < p.m) cp_async16_fill(dst + i * 4 * kXPitch, src, inside ? 16 : 0);
      src += step;
    }
  };
  bool with_x = C::kXRing && !p.pdl;
  auto issue = [&](uint32_t stage, uint32_t bar) {
    if (p_tile < tile1) {
      const uint32_t raw = stage + R * 512, raw_zero = raw + C::kSets * set_bytes;
      const uint32_t group = uint32_t(p_kb >> p.group_shift);
      const uint32_t scale_at = p_scale + group * set_units, zero_at = p_zero + group * zero_set_units;
      if constexpr (C::kBulk) {
        if (lane == 0) {
          mbar_expect(bar, R * 512 + C::kSets * (set_bytes + (C::kZeros ? zero_set_bytes : 0)));
          if constexpr (R == 3) {
            bulk_copy(stage, at16(p.codes, p_code), 512, bar);
            bulk_copy(stage + 512, at16(p.codes, p_code + p_delta1), 512, bar);
            bulk_copy(stage + 1024, at16(p.codes, p_code + p_delta2), 512, bar);
          } else {
            bulk_copy(stage, at16(p.codes, p_code), R * 512, bar);
          }
          bulk_copy(raw, at16(p.scales, scale_at), set_bytes, bar);
          if constexpr (C::kSets == 2) bulk_copy(raw + set_bytes, at16(p.scales, scale_at + p_second), set_bytes, bar);
          if constexpr (C::kZeros) {
            bulk_copy(raw_zero, at16(p.zeros, zero_at), zero_set_bytes, bar);
            if constexpr (C::kSets == 2) bulk_copy(raw_zero + zero_set_bytes, at16(p.zeros, zero_at + p_zero_second), zero_set_bytes, bar);
          }
        }
      } else {
        const uint32_t dst = stage + lane * 16;
        const uint8_t* const src = at16(p.codes, p_code);
#pragma unroll
        for (int r = 0; r < R; ++r)
          cp_async16(dst + r * 512, R == 3 && r > 0 ? at16(p.codes, p_code + (r == 1 ? p_delta1 : p_delta2)) : src + r * 512);
        copy_sets(raw, p.scales, scale_at, p_second, set_units);
        if constexpr (C::kZeros) copy_sets(raw_zero, p.zeros, zero_at, p_zero_second, zero_set_units);
        if (C::kXRing && with_x) issue_x(stage, p_kb);
      }
      p_code += 128;
      if (++p_kb == kb1) {
        p_kb = kb0;
        if (++p_tile < tile1) producer_tile();
      }
    }
    if constexpr (!C::kBulk) cp_commit();
  };
  if (kb0 == kb1) p_tile = tile1;
  else producer_tile();
#pragma unroll 1
  for (int s = 0; s < S; ++s) issue(ring + s * p.stage_bytes, bars + s * 8);

  // ---- the table ----
  const uint32_t kNestedMap = window + kSmemBase + 128;  // the holes of the table: 8 pieces of 128 bytes, 256 apart
  auto build_table = [&]() {
    if constexpr (C::kCodebook) {
      // Entry e of the table is 32 copies of (value of the low nibble, value of the high nibble). Two threads write it.
#pragma unroll 1
      for (int t = tid; t < 512; t += threads) {
        const int e = t >> 1;
        const float lo = t == tid ? cb_lo : __ldg(p.codebook + (e & 15)), hi = t == tid ? cb_hi : __ldg(p.codebook + (e >> 4));
        const uint32_t v = pack2<T>(lo, hi);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          sts128(window + kSmemBase + e * 256 + (t & 1) * 64 + ((j + e) & 3) * 16, uint4{v, v, v, v});
      }
      if constexpr (C::kNested)
        if (tid < 256) sts_f(kNestedMap + (tid >> 5) * 256 + (tid & 31) * 4, map_value);
    }
  };
  auto x_barrier = [&]() {
    if (p.row_warps == 1) __syncwarp();
    else bar_sync(1 + wk, p.row_warps * 32);
  };

  if (p.pdl) {
    grid_dependency_wait();
    if constexpr (C::kBulk) {
      bulk_x();
    } else if constexpr (C::kXRing) {  // x of the stages already requested
      for (int s = 0, kb = kb0; s < S && kb0 < kb1; ++s) {
        issue_x(ring + s * p.stage_bytes, kb);
        if (++kb == kb1) kb = kb0;
      }
      cp_commit();
      with_x = true;
    } else {
      load_x(kb0);
    }
  }
  build_table();
  if constexpr (C::kBulk) {
    if constexpr (C::kCodebook) __syncthreads();
    mbar_wait(x_bar, 0);
  } else {
    if (p.pdl) cp_wait<0>();
    else if constexpr (!C::kXRing) cp_wait<S>();
    if constexpr (C::kCodebook) __syncthreads();
    else if constexpr (!C::kXRing) x_barrier();
  }

  const bool x_streams = !C::kBulk && !C::kXRing && p.x_blocks << parts_log2 < p.k_blocks;  // x of a warp column does not fit: reload it on the way
  const uint32_t lane4 = window | lane * 4;
  const uint32_t x_mine = C::kBulk ? window + p.off_x + (kb0 - cta_kb0) * 128 : x_region;
  const uint32_t b_lane = x_mine + min(lane & 7, p.m - 1) * p.x_pitch + (lane >> 3) * 16;
  const uint32_t b_lane2 = MT == 2 ? x_mine + min((lane & 7) + 8, p.m - 1) * p.x_pitch + (lane >> 3) * 16 : 0;

  // Sums of x over each group of this warp's blocks, [block][group][token]; every warp of a column writes the same.
  constexpr float kMagic = kFp16 ? 1024.f : 128.f, kHigh = kFp16 ? 16.f : 1.f;  // rows g + 8 hold kHigh * code
  const float kLow = kMagic + p.code_bias, kHighOffset = kMagic + kHigh * p.code_bias;
  const uint32_t sums = window + p.off_sums + wk * (p.x_blocks * G * MT * 32);
  auto sum_x = [&](int blocks) {
    if constexpr (!C::kCodebook) {
      const uint32_t ones[4] = {pack2<T>(1, 1), pack2<T>(1, 1), pack2<T>(1, 1), pack2<T>(1, 1)};
#pragma unroll 1
      for (int i = 0; i < blocks; ++i) {
#pragma unroll
        for (int j = 0; j < MT; ++j) {
          const uint32_t at = (j == 0 ? b_lane : b_lane2) + i * 128;
          uint32_t b[4][2];
          ldsm4(at, b[0][0], b[0][1], b[1][0], b[1][1]);
          ldsm4(at + 64, b[2][0], b[2][1], b[3][0], b[3][1]);
#pragma unroll
          for (int q = 0; q < G; ++q) {
            float d[4] = {0, 0, 0, 0};
#pragma unroll
            for (int s = q * kStepsPerGroup; s < (q + 1) * kStepsPerGroup; ++s) mma<T>(d, ones, b[s]);
            if (lane < 4) sts_f2(sums + ((i * G + q) * MT + j) * 32 + lane * 8, d[0], d[1]);
          }
        }
      }
      __syncwarp();
    }
  };

  float acc[R][MT][4];
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int j = 0; j < MT; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[r][j][i] = 0;

  uint32_t stage = ring, bar = bars, parity = 0;
  // Nested: the second-level scales of this lane's two rows.
  int nest_at[2] = {-1, -1};
  float nest[2] = {0, 0};
  const int out_rows = C::kRowsPow2 * p.row_warps;  // a thread's output row and first token
  const int out_shift = 31 - __clz(out_rows);
  const int out_row = tid & (out_rows - 1), out_token = tid >> out_shift, out_token_step = threads >> out_shift;
  const int out_wr = out_row / C::kRowsPow2, out_local = out_row % C::kRowsPow2;

  bool first = true;
#pragma unroll 1
  for (int tile = tile0; tile < tile1; ++tile) {
    const int atom0 = first_atom(tile);
    const int out_n = ((tile * p.row_warps + out_wr) * R) * 16 + out_local;
    const bool out_live = out_local < C::kRows && out_n < p.n;
    float bias = 0;
    if (p.bias != nullptr && out_live) bias = to_float(static_cast<const T*>(p.bias)[out_n]);

    // Where this lane finds and leaves the scales it converts.
    const int my_atom = atom0 + ((lane >> 3) < R ? (lane >> 3) : 0);
    const int my_set = C::kSets == 2 ? min(my_atom >> 2, p.slabs - 1) - min(atom0 >> 2, p.slabs - 1) : 0;
    const int my_position = (lane & 7) * 8 + 2 * (my_atom & 3);
    const int my_row = my_atom * 16 + (lane & 7);
    // Direct scales: where this lane's pairs (rows g, g + 8) of the atoms stand in a stage.
    uint32_t direct_at[C::kSets == 2 ? 3 : 1];
    if constexpr (C::kDirect) {
      const int g8 = (lane >> 2) * 8;
      if constexpr (R == 3) {
#pragma unroll
        for (int r = 0; r < 3; ++r) {
          const int atom = min(atom0 + r, p.atoms - 1);
          const int set = (atom >> 2) - (min(atom0, p.atoms - 1) >> 2);
          direct_at[r] = R * 512 + set * set_bytes + (g8 + 2 * (atom & 3)) * kScaleSize;
        }
      } else {
        direct_at[0] = R * 512 + (g8 + 2 * (atom0 & 3)) * kScaleSize;
      }
    }
    auto load_scales = [&](float2 (&out)[R], uint32_t stage, int q) {
      auto two = [](uint32_t v) -> float2 {
        if constexpr (C::kScales == Scales::kFp16) return __half22float2(*reinterpret_cast<const __half2*>(&v));
        return {__uint_as_float(v << 16), __uint_as_float(v & 0xFFFF0000u)};
      };
      const uint32_t base = stage + q * 64 * kScaleSize;
      if constexpr (C::kScales == Scales::kFp32) {
        if constexpr (R == 1) {
          out[0] = lds_f2(base + direct_at[0]);
        } else if constexpr (R == 3) {
#pragma unroll
          for (int r = 0; r < R; ++r) out[r] = lds_f2(base + direct_at[r]);
        } else {
#pragma unroll
          for (int r = 0; r < R; r += 2) {
            const uint4 v = lds128(base + direct_at[0] + r * 8);
            out[r] = {__uint_as_float(v.x), __uint_as_float(v.y)};
            out[r + 1] = {__uint_as_float(v.z), __uint_as_float(v.w)};
          }
        }
      } else if constexpr (R == 4) {
        const uint4 v = lds128(base + direct_at[0]);
        out[0] = two(v.x), out[1] = two(v.y), out[2] = two(v.z), out[3] = two(v.w);
      } else if constexpr (R == 3) {
#pragma unroll
        for (int r = 0; r < R; ++r) out[r] = two(lds_u32(base + direct_at[r]));
      } else {
#pragma unroll
        for (int r = 0; r < R; ++r) out[r] = two(lds_u32(base + direct_at[0] + r * 4));
      }
      if constexpr (!C::kCodebook && kFp16) {
#pragma unroll
        for (int r = 0; r < R; ++r) out[r].y *= 1.f / 16;
      }
    };
    auto nest_index = [&](int row, int group) {
      return int((int64_t(min(row, p.n - 1)) * p.groups + min(group, p.groups - 1)) >> 8);
    };
    if constexpr (C::kNested) {
      if (kb0 < kb1) {
        const int group = (kb0 >> p.group_shift) * G;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          nest_at[h] = nest_index(my_row + 8 * h, group);
          nest[h] = __ldg(p.nested_absmax + nest_at[h]);
        }
      }
    }

    for (int phase = kb0; phase < kb1; phase += C::kBulk || C::kXRing ? 1 << 30 : p.x_blocks) {
    if (x_streams && !first) {  // the warp column's x does not fit: its next part
      x_barrier();
      load_x(phase);
      cp_wait<0>();
      x_barrier();
    }
    const int phase_end = C::kBulk || C::kXRing ? kb1 : min(phase + p.x_blocks, kb1);
    if (!C::kXRing && (first || x_streams)) sum_x(phase_end - phase);
    first = false;
    uint32_t sum_at = sums + (lane & 3) * 8;
    uint32_t b_at = b_lane, b_at2 = b_lane2;
    const uint32_t ring_b = stage_x + min(lane & 7, p.m - 1) * kXPitch + (lane >> 3) * 16;
    const uint32_t ring_b2 = stage_x + min((lane & 7) + 8, p.m - 1) * kXPitch + (lane >> 3) * 16;
#pragma unroll 1
    for (int kb = phase; kb < phase_end; ++kb) {
      if constexpr (C::kBulk) mbar_wait(bar, parity);
      else cp_wait<S - 1>();
      __syncwarp();

      // x fragments of the block.
      if constexpr (C::kXRing) {
        b_at = stage + ring_b;
        b_at2 = stage + ring_b2;
      }
      uint32_t b[4][MT][2];
      ldsm4(b_at, b[0][0][0], b[0][0][1], b[1][0][0], b[1][0][1]);
      ldsm4(b_at + 64, b[2][0][0], b[2][0][1], b[3][0][0], b[3][0][1]);
      if constexpr (MT == 2) {
        ldsm4(b_at2, b[0][1][0], b[0][1][1], b[1][1][0], b[1][1][1]);
        ldsm4(b_at2 + 64, b[2][1][0], b[2][1][1], b[3][1][0], b[3][1][1]);
      }
      b_at += 128;
      b_at2 += 128;
      uint4 w[R];
#pragma unroll
      for (int r = 0; r < R; ++r) w[r] = lds128(stage + r * 512 + lane * 16);

      // Scales to fp32.
      const uint32_t raw = stage + R * 512 + my_set * set_bytes;
      if (!C::kDirect && (R == 4 || lane < 8 * R)) {
#pragma unroll
        for (int q = 0; q < G; ++q) {
          float2 s;
          if constexpr (C::kNested) {
            const uint32_t v = lds_u16(raw + q * 64 + my_position);
            const int group = (kb >> p.group_shift) * G + q;
            float f[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const int at = nest_index(my_row + 8 * h, group);
              if (at != nest_at[h]) {
                nest_at[h] = at;
                nest[h] = __ldg(p.nested_absmax + at);
              }
              const uint32_t code = h == 0 ? v & 255 : v >> 8;
              f[h] = __fadd_rn(__fmul_rn(lds_f(kNestedMap + (code >> 5) * 256 + (code & 31) * 4), nest[h]), p.nested_offset);
            }
            s = {f[0], f[1]};
          } else {
            s = load_pair(raw + (q * 64 + my_position) * p.scale_size, p.scale_type, p.scale_size);
          }
          if constexpr (!C::kCodebook && kFp16) s.y *= 1.f / 16;
          sts_f2(resolved + q * (R * 64) + lane * 8, s.x, s.y);
          if constexpr (C::kZeros) {
            const uint32_t raw_zero = stage + R * 512 + C::kSets * set_bytes + my_set * zero_set_bytes;
            float2 z;
            if (p.zero_type == int(ZeroType::kInteger)) {
              const uint32_t v = lds_u16(raw_zero + q * 64 + my_position);
              z = {float(v & 255), float(v >> 8)};
            } else {
              z = load_pair(raw_zero + (q * 64 + my_position) * p.zero_size, p.scale_type, p.zero_size);
            }
            sts_f2(resolved + (G + q) * (R * 64) + lane * 8, z.x / kLow, z.y * kHigh / kHighOffset);
          }
        }
      }
      if constexpr (!C::kDirect) __syncwarp();

#pragma unroll
      for (int q = 0; q < G; ++q) {
        float offset[MT][4];
#pragma unroll
        for (int j = 0; j < MT; ++j) {
          float2 o = {0, 0};
          if constexpr (!C::kCodebook && C::kXRing) {
            const uint32_t one = pack2<T>(1, 1), ones[4] = {one, one, one, one};
            float sum[4] = {0, 0, 0, 0};
#pragma unroll
            for (int s = q * kStepsPerGroup; s < (q + 1) * kStepsPerGroup; ++s) mma<T>(sum, ones, b[s][j]);
            o = {sum[0], sum[1]};
          } else if constexpr (!C::kCodebook) {
            o = lds_f2(sum_at + q * (MT * 32) + j * 32);
          }
          offset[j][0] = -kLow * o.x;
          offset[j][1] = -kLow * o.y;
          offset[j][2] = kFp16 ? -kHighOffset * o.x : offset[j][0];
          offset[j][3] = kFp16 ? -kHighOffset * o.y : offset[j][1];
        }
        float2 scale[R];
        if constexpr (C::kDirect) load_scales(scale, stage, q);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          float d[MT][4];
#pragma unroll
          for (int j = 0; j < MT; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) d[j][i] = offset[j][i];
#pragma unroll
          for (int s = q * kStepsPerGroup; s < (q + 1) * kStepsPerGroup; ++s) {
            const uint32_t v = s == 0 ? w[r].x : s == 1 ? w[r].y : s == 2 ? w[r].z : w[r].w;
            uint32_t a[4];
            if constexpr (C::kCodebook) {
              a[0] = lut_load(lut_address<0>(v, lane4));
              a[1] = lut_load(lut_address<1>(v, lane4));
              a[2] = lut_load(lut_address<2>(v, lane4));
              a[3] = lut_load(lut_address<3>(v, lane4));
            } else if constexpr (kFp16) {
              a[0] = and_or<0x000F000Fu, 0x64006400u>(v);
              a[1] = and_or<0x00F000F0u, 0x64006400u>(v);
              a[2] = and_or<0x000F000Fu, 0x64006400u>(v >> 8);
              a[3] = and_or<0x00F000F0u, 0x64006400u>(v >> 8);
            } else {
              a[0] = and_or<0x000F000Fu, 0x43004300u>(v);
              a[1] = and_or<0x000F000Fu, 0x43004300u>(v >> 4);
              a[2] = and_or<0x000F000Fu, 0x43004300u>(v >> 8);
              a[3] = and_or<0x000F000Fu, 0x43004300u>(v >> 12);
            }
#pragma unroll
            for (int j = 0; j < MT; ++j) mma<T>(d[j], a, b[s][j]);
          }
          const uint32_t at = resolved + (q * R + r) * 64 + (lane >> 2) * 8;
          if constexpr (C::kZeros) {
            const float2 z = lds_f2(at + G * R * 64);
#pragma unroll
            for (int j = 0; j < MT; ++j) {
              d[j][0] += z.x * offset[j][0];
              d[j][1] += z.x * offset[j][1];
              d[j][2] += z.y * offset[j][2];
              d[j][3] += z.y * offset[j][3];
            }
          }
          const float2 s = C::kDirect ? scale[r] : lds_f2(at);
#pragma unroll
          for (int j = 0; j < MT; ++j) {
            acc[r][j][0] += s.x * d[j][0];
            acc[r][j][1] += s.x * d[j][1];
            acc[r][j][2] += s.y * d[j][2];
            acc[r][j][3] += s.y * d[j][3];
          }
        }
      }
      sum_at += G * MT * 32;
      if constexpr (C::kBulk || C::kDirect || C::kXRing) __syncwarp();
      issue(stage, bar);
      stage += p.stage_bytes;
      bar += 8;
      if (stage == ring_end) {
        stage = ring;
        bar = bars;
        parity ^= 1;
      }
    }
    }

    // ---- sums of the tile ----
    __syncwarp();
    if (tile != tile0) __syncthreads();  // everyone has read the previous tile's
    const uint32_t red = window + p.off_red + warp * p.red_stride;
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int j = 0; j < MT; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = j * 8 + 2 * (lane & 3) + (i & 1), row = r * 16 + (lane >> 2) + 8 * (i >> 1);
          if (token < p.m) sts_f(red + token * C::kRedPitch + row * 4, acc[r][j][i]);
          acc[r][j][i] = 0;
        }
    __syncthreads();
    const bool sums = out_local < C::kRows;
    auto sum_warps = [&](int token) {
      uint32_t at = window + p.off_red + (out_wr << p.k_warps_log2) * p.red_stride + token * C::kRedPitch + out_local * 4;
      float v = 0;
      if (k_warps == 16) {  // all loads at once
        float u[4][4];
#pragma unroll
        for (int i = 0; i < 16; ++i) u[i / 4][i % 4] = lds_f(at + i * p.red_stride);
        v = ((u[0][0] + u[0][1]) + (u[0][2] + u[0][3])) + ((u[1][0] + u[1][1]) + (u[1][2] + u[1][3])) +
            (((u[2][0] + u[2][1]) + (u[2][2] + u[2][3])) + ((u[3][0] + u[3][1]) + (u[3][2] + u[3][3])));
      } else if (k_warps >= 4) {
#pragma unroll 1
        for (int i = 0; i < k_warps; i += 4) {
          const float v0 = lds_f(at), v1 = lds_f(at + p.red_stride), v2 = lds_f(at + 2 * p.red_stride), v3 = lds_f(at + 3 * p.red_stride);
          v += (v0 + v1) + (v2 + v3);
          at += 4 * p.red_stride;
        }
      } else {
#pragma unroll 1
        for (int i = 0; i < k_warps; ++i, at += p.red_stride) v += lds_f(at);
      }
      return v;
    };
    T* const y = static_cast<T*>(p.y);
    if (p.cluster == 1) {
      if (out_live)
#pragma unroll 1
        for (int token = out_token; token < p.m; token += out_token_step)
          y[int64_t(token) * p.ldy + out_n] = T(sum_warps(token) * p.tensor_scale + bias);
    } else {
      // Round i of every thread's outputs belongs to CTA i % cluster, which gets the others' sums.
      const int buffer = (tile - tile0) & 1;
      const uint32_t exchange = window + p.off_exchange + buffer * (p.cluster * p.m * out_rows * 4);
      if (tile == tile0) cluster_wait();  // the others run
      if (sums)
#pragma unroll 1
        for (int token = out_token, i = 0; token < p.m; token += out_token_step, ++i)
          sts_f_remote(exchange + ((rank * p.m + token) * out_rows + out_row) * 4, i & (p.cluster - 1), sum_warps(token));
      __syncwarp();
      cluster_arrive();
      cluster_wait();
      if (out_live)
#pragma unroll 1
        for (int token = out_token, i = 0; token < p.m; token += out_token_step, ++i)
          if ((i & (p.cluster - 1)) == rank) {
            float v = 0;
#pragma unroll 1
            for (int c = 0; c < p.cluster; ++c) v += lds_f(exchange + ((c * p.m + token) * out_rows + out_row) * 4);
            y[int64_t(token) * p.ldy + out_n] = T(v * p.tensor_scale + bias);
          }
    }
  }
  if (p.cluster > 1 && tile0 >= tile1) cluster_wait();
  if constexpr (!C::kBulk) cp_wait<0>();
}

// ---- host ----
struct Plan {
  int cluster, k_warps, row_warps;
  int grid_clusters;  // clusters launched
  int smem;
  bool ok;
};

// Fills p's launch fields. ctas: CTAs to launch at most (multiple of cluster).
template <class C>
static Plan make_plan(Params& p, int cluster, int k_warps, int row_warps, int ctas, int smem_limit) {
  Plan plan{cluster, k_warps, row_warps, 0, 0, false};
  const int warps = k_warps * row_warps;
  p.cluster = cluster;
  p.row_warps = row_warps;
  p.k_warps_log2 = 0;
  while ((1 << p.k_warps_log2) < k_warps) ++p.k_warps_log2;
  const int live_atoms = (p.n + 15) / 16, tile_atoms = C::kAtoms * row_warps;
  p.tiles = (live_atoms + tile_atoms - 1) / tile_atoms;
  p.clusters = ctas / cluster < p.tiles ? ctas / cluster : p.tiles;
  const int passes = (p.tiles + p.clusters - 1) / p.clusters;
  p.clusters = (p.tiles + passes - 1) / passes;  // no more CTAs than the longest one needs
  p.tiles_each = p.tiles / p.clusters;
  p.tiles_extra = p.tiles % p.clusters;
  p.cluster_log2 = 0;
  while ((1 << p.cluster_log2) < cluster) ++p.cluster_log2;
  plan.grid_clusters = p.clusters;
  const int scale_raw = C::kSets * C::kGroups * 64 * p.scale_size, zero_raw = p.zeros ? C::kSets * C::kGroups * 64 * p.zero_size : 0;
  p.stage_bytes = C::kAtoms * 512 + scale_raw + zero_raw;
  if (C::kXRing) p.stage_bytes += p.m * 144;
  p.ring_bytes = C::kStages * p.stage_bytes;
  const int partial = p.m * C::kRedPitch;
  const bool alias = passes == 1;
  if (alias && p.ring_bytes < partial) p.ring_bytes = (partial + 127) / 128 * 128;
  int at = kSmemBase + (C::kCodebook ? 65536 : 0);
  p.off_ring = at;
  at += warps * p.ring_bytes;
  if (alias) {
    p.off_red = p.off_ring;
    p.red_stride = p.ring_bytes;
  } else {
    p.off_red = at;
    p.red_stride = partial;
    at += warps * partial;
  }
  p.off_resolved = at;
  if (!C::kDirect) at += warps * C::kGroups * C::kAtoms * 64 * (C::kZeros ? 2 : 1);
  p.off_bars = at;
  if (C::kBulk) at += warps * C::kStages * 8 + 8;
  at = (at + 127) / 128 * 128;
  p.off_exchange = at;
  if (cluster > 1) at += (passes > 1 ? 2 : 1) * cluster * p.m * C::kRowsPow2 * row_warps * 4;
  p.off_x = at;
  // x: all of the warp's k if it fits, otherwise as much as does.
  const int parts = cluster * k_warps;
  const int most = (p.k_blocks + parts - 1) / parts;
  int blocks = most < 1 ? 1 : most;
  const int cta_blocks = (p.k_blocks + cluster - 1) / cluster;
  if (C::kXRing) {
    plan.smem = at;
    p.x_blocks = blocks;
    plan.ok = at <= smem_limit && p.x_vector && warps <= kMaxWarps && C::kRowsPow2 * row_warps <= warps * 32 && p.atoms >= C::kAtoms;
    return plan;
  }
  while (!C::kBulk && blocks > 1 && at + 16 + k_warps * (p.m * (blocks * 128 + 16) + (C::kCodebook ? 0 : blocks * C::kGroups * C::kTokens8 * 32)) > smem_limit) blocks = (blocks + 1) / 2;
  p.x_blocks = blocks;
  p.x_pitch = (C::kBulk ? cta_blocks : blocks) * 128 + 16;
  at += (C::kBulk ? 1 : k_warps) * p.m * p.x_pitch;
  at = (at + 15) / 16 * 16;
  p.off_sums = at;
  if (!C::kCodebook) at += k_warps * blocks * C::kGroups * C::kTokens8 * 32;
  plan.smem = at;
  plan.ok = at <= smem_limit && (!C::kBulk || (p.x_vector && p.m <= warps && p.k_blocks >= cluster)) && warps <= kMaxWarps && C::kRowsPow2 * row_warps <= warps * 32 && p.atoms >= C::kAtoms;
  return plan;
}

}  // namespace cutlass_ext::stream
