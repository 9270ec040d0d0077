// Family `simt`: y = x @ W^T + bias on the FP32 cores. Any format, any shape; sums in fp32, x and y in fp32, fp16 or
// bf16. Meant for few tokens: a unit's weights are decoded once for up to 8 tokens.
//
// Lane l = 4g + t of a warp decodes what the tensor cores would give it of two atoms: rows g, g + 8, g + 16, g + 24 and
// four k of each 16-k step, and multiplies them with x from shared memory. The products of a group, or of a step where
// groups are shorter than 64 k, are summed, then multiplied with the scale in fp32; sums of lanes, warps and thread
// blocks (of a cluster, through distributed shared memory) are added in a fixed order, so a result depends neither on
// the run nor on the neighbouring tokens.
#include <cuda_runtime.h>

#include "kernels/cuda/cluster_launch.hpp"
#include "kernels/cuda/codebook.hpp"
#include "kernels/cuda/device.hpp"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/simt_codes.cuh"
#include "kernels/cuda/simt_plan.hpp"
#include "kernels/decode.hpp"
#include "kernels/instance.hpp"

namespace cutlass_ext {
namespace cuda {
namespace {

constexpr int kThreads = kSimtWarps * layout::kLanes;
constexpr int kLaneRows = 4;  // rows of a unit that a lane works on
constexpr int kLaneK = 4;     // k of a step that it works on
constexpr int kQuad = 4;      // lanes with the same rows
constexpr unsigned kAll = 0xFFFFFFFFu;
static_assert(layout::scale_position(8) == 1 && layout::scale_position(layout::kAtomRows) == 2 &&
                  layout::scale_position(kSimtUnitRows) == kLaneRows,
              "a lane's four scales of a unit stand side by side");

// How the scales of a 64-k block change: not, every 16 or 32 k, or anywhere.
enum class Groups { kWhole, kSteps, kFlat };

struct Params {
  Weight weight;
  CodebookParameter codebook;
  const void* x;
  void* y;
  const void* bias;
  int64_t ldx, ldy, m;
  DType dtype;
  bool x_pairs;            // two values of x from an even k may be one load
  int blocks;              // along K
  int groups;              // in a 64-k block, as packed: 1, 2 or 4
  int group_shift;         // group of k = k >> group_shift
  uint32_t row_groups;     // of a row of the weight
  uint32_t packed_groups;  // of a slab
  SimtMemory memory;
  SimtPlan plan;
  int cluster_shift;  // log2(plan.cluster)
  int row_shift;      // log2(plan.row_warps)
  int k_warps;        // plan.k_warps()
};

// Groups of a 64-k block.
template <Groups kGroups>
__device__ __forceinline__ int groups_of(const Params& p) {
  return kGroups == Groups::kWhole ? 1 : p.groups;
}

// ---- weights: a ring of units for each warp

// Where the units of 32 rows come from; a lane's part of each. All places are numbers of 32 bits: fits_32_bits.
template <class Codes, Groups kGroups, int kTokens>
struct UnitSource {
  static constexpr int kPieces = kSimtUnitAtoms * layout::atom_bytes(Codes::kBits) / 16;

  uint32_t first_row;

  // Requests the unit of a k block.
  __device__ __forceinline__ void request(const Params& p, uint8_t* stage, int block, int lane) const {
    const Weight& w = p.weight;
    uint32_t row = first_row;
    // Registers are short with 8 tokens. Opaque, so that what follows from these is computed in each call and not held
    // throughout the loop; that this ends the spills was found by trying (nvcc 13.0).
    if constexpr (kTokens == 8) {
      asm volatile("" : "+r"(row));
#if __CUDA_ARCH__ >= 900
      asm volatile("" : "+r"(lane));
#endif
    }
    const uint32_t slab = row / layout::kBlockRows, row_in_slab = row % layout::kBlockRows;

    constexpr uint32_t kBlockPieces = layout::block_bytes(Codes::kBits) / 16;
    constexpr uint32_t kAtomPieces = layout::atom_bytes(Codes::kBits) / 16;
    const uint32_t code_piece = (slab * static_cast<uint32_t>(p.blocks) + block) * kBlockPieces +
                                row_in_slab / layout::kAtomRows * kAtomPieces + lane;
    const uint8_t* const from = w.codes + uint64_t{code_piece} * 16;
#pragma unroll
    for (int first = 0; first < kPieces; first += layout::kLanes) {
      if (first + layout::kLanes <= kPieces || first + lane < kPieces) {
        copy_async<16>(stage + (first + lane) * 16, from + first * 16);
      }
    }
    if constexpr (kGroups != Groups::kFlat) {
      const uint32_t group = static_cast<uint32_t>(block) * layout::kBlockK >> p.group_shift;
      const int groups = groups_of<kGroups>(p);
      if (lane < groups * 8) {
        // Lane = 8 * group + g takes the four values of g's rows.
        const uint32_t piece = (slab * p.packed_groups + group + lane / 8) * (layout::kBlockRows / kLaneRows) +
                               (layout::scale_position(static_cast<int>(row_in_slab)) + lane % 8 * 8) / kLaneRows;
        copy_values(stage + p.memory.scales, w.scales, size_of(w.scale_type), piece, lane);
        if constexpr (Codes::kZeros) {
          copy_values(stage + p.memory.zeros, w.zeros, zero_size(w.zero_type, w.scale_type), piece, lane);
        }
      }
      if (Codes::kIsCodebook && w.scale_type == ScaleType::kNested) {
        const uint32_t n = row + lane % kQuad * 8 + lane / kQuad;
#pragma unroll 1
        for (int i = 0; i < groups; ++i) {
          // Padding has no second level.
          const bool valid = n < static_cast<uint32_t>(w.n) && group + i < p.row_groups;
          const float* absmax = w.nested_absmax + (valid ? (n * p.row_groups + group + i) / kNestedBlock : 0);
          copy_async<4>(stage + p.memory.second + (i * layout::kLanes + lane) * 4, absmax, valid);
        }
      }
    }
  }

 private:
  // The lane's kLaneRows values of `size` bytes: `piece` counts such.
  __device__ __forceinline__ void copy_values(uint8_t* to, const void* values, int size, uint32_t piece,
                                              int lane) const {
    const unsigned bytes = kLaneRows * size;
    const uint8_t* const from = static_cast<const uint8_t*>(values) + uint64_t{piece} * bytes;
    to += lane * bytes;
    if (size == 4) {
      copy_async<16>(to, from);
    } else if (size == 2) {
      copy_async<8>(to, from);
    } else {
      copy_async<4>(to, from);
    }
  }
};

// Scales and zeros of a unit as fp32, where they are not stored so: a lane decodes one value of each group.
template <Groups kGroups>
__device__ __forceinline__ void decode_values(const Params& p, uint8_t* memory, const uint8_t* stage, const float* map,
                                              int lane) {
  Weight staged = p.weight;
  staged.scales = stage + p.memory.scales;
  staged.zeros = stage + p.memory.zeros;
  staged.nested_map = map;
  staged.nested_absmax = reinterpret_cast<const float*>(stage + p.memory.second);
#pragma unroll 1
  for (int i = lane; i < groups_of<kGroups>(p) * layout::kLanes; i += layout::kLanes) {
    // The stage has a second-level value for each scale.
    if (p.memory.decoded_scales != 0) {
      reinterpret_cast<float*>(memory + p.memory.decoded_scales)[i] =
          decode_scale(staged, i, int64_t{i} * kNestedBlock);
    }
    if (p.memory.decoded_zeros != 0) {
      reinterpret_cast<float*>(memory + p.memory.decoded_zeros)[i] = decode_zero(staged, i);
    }
  }
  __syncwarp();
}

// ---- x: chunks of K for all warps

// Shared x is [block][step][token][t][k = 2t, 2t + 1, 2t + 8, 2t + 9]: a lane's four values are one load.
__device__ __forceinline__ int x_position(int block, int k, int token, int tokens) {
  const int step = k / layout::kStepK, in_step = k % layout::kStepK;
  return ((block * layout::kSteps + step) * tokens + token) * layout::kStepK + in_step % 8 / 2 * kLaneK + in_step % 2 +
         in_step / 8 * 2;
}

__device__ __forceinline__ float x_value(const Params&, uint32_t bits) { return bits_to_float(bits); }
__device__ __forceinline__ float x_value(const Params& p, uint16_t bits) {
  return p.dtype == DType::kFp16 ? fp16_to_float(bits) : bf16_to_float(bits);
}

// k blocks [first, first + count) of kTokens tokens as fp32, zeros beyond K and M. A warp takes a token of a block, a
// lane two k of it. Element: the bits of a value of x, Pair: of two.
template <class Element, class Pair, int kTokens>
__device__ __forceinline__ void load_x(const Params& p, float* shared, int64_t first_token, int first, int count) {
  static_assert(sizeof(Pair) == 2 * sizeof(Element));
  constexpr int kAtOnce = 8;  // loads in flight of a thread: all of a chunk's
  const int k_in_block = threadIdx.x % layout::kLanes * 2, rows = count * kTokens;
  for (int start = threadIdx.x / layout::kLanes; start < rows; start += kAtOnce * kSimtWarps) {
    Pair pairs[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = start + i * kSimtWarps;
      const int64_t token = first_token + row % kTokens;
      const int64_t k = int64_t{first + row / kTokens} * layout::kBlockK + k_in_block;
      const Element* const from = static_cast<const Element*>(p.x) + (token * p.ldx + k);
      const bool inside = row < rows && token < p.m && k < p.weight.k;
      if (p.x_pairs) {
        pairs[i] = inside ? *reinterpret_cast<const Pair*>(from) : Pair{0};
      } else {
        const Pair low = inside ? from[0] : Element{0}, high = inside && k + 1 < p.weight.k ? from[1] : Element{0};
        pairs[i] = static_cast<Pair>(low | high << 8 * sizeof(Element));
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = start + i * kSimtWarps;
      if (row < rows) {
        const Element low = static_cast<Element>(pairs[i]),
                      high = static_cast<Element>(pairs[i] >> 8 * sizeof(Element));
        float* const to = shared + x_position(row / kTokens, k_in_block, row % kTokens, kTokens);
        *reinterpret_cast<float2*>(to) = make_float2(x_value(p, low), x_value(p, high));
      }
    }
  }
}

template <int kTokens>
__device__ __forceinline__ void load_x(const Params& p, float* shared, int64_t first_token, int first, int count) {
  if (p.dtype == DType::kFp32) {
    load_x<uint32_t, uint64_t, kTokens>(p, shared, first_token, first, count);
  } else {
    load_x<uint16_t, uint32_t, kTokens>(p, shared, first_token, first, count);
  }
}

// ---- products

// Scales of flat blocks: one for each weight.
__device__ __forceinline__ float flat_scale(const Params& p, int64_t n, int64_t k) {
  if (n >= p.weight.n || k >= p.weight.k) return 0.0f;
  const int64_t group = (n * p.weight.k + k) >> p.group_shift;
  return decode_scale(p.weight, group, group);
}

// What a lane needs of a unit.
template <class Codes>
struct Unit {
  typename Codes::Words words[kSimtUnitAtoms];
  typename Codes::State state;
  const float4* x;
  const float4* scales;  // of the lane's rows, each group's
  const float4* zeros;
  int64_t row;  // flat scales only
  int block;
};

// The values of a lane's rows.
__device__ __forceinline__ void load_values(const float4* from, float (&values)[kLaneRows]) {
  const float4 v = *from;
  values[0] = v.x, values[1] = v.y, values[2] = v.z, values[3] = v.w;
}

// Steps kStep .. 3 of a unit: 32 rows x 16 k x kTokens each. `totals` gets the sums of each group, scaled; those of a
// step where a block has several groups, so that no sums live from step to step.
template <class Codes, int kTokens, Groups kGroups, int kStep = 0>
__device__ __forceinline__ void multiply_steps(const Params& p, const Unit<Codes>& unit, int lane,
                                               float (&sums)[kLaneRows][kTokens], float (&totals)[kLaneRows][kTokens]) {
  constexpr bool kLast = kStep + 1 == layout::kSteps;
  constexpr bool kSumStarts = kStep == 0 || kGroups == Groups::kSteps;
  constexpr bool kSumEnds = kLast || kGroups == Groups::kSteps;
  // Of the step's group.
  const int values = kStep * groups_of<kGroups>(p) / layout::kSteps * (layout::kLanes / kLaneRows);
  float weights[kSimtUnitAtoms][2][kLaneK];
#pragma unroll
  for (int atom = 0; atom < kSimtUnitAtoms; ++atom) {
    Codes::template decode<kStep>(unit.words[atom], unit.state, weights[atom]);
  }
  float zero[kLaneRows];
  if constexpr (Codes::kZeros) load_values(unit.zeros + values, zero);
#pragma unroll
  for (int j = 0; j < kLaneRows; ++j) {
    float (&w)[kLaneK] = weights[j / 2][j % 2];
#pragma unroll
    for (int i = 0; i < kLaneK; ++i) {
      if constexpr (Codes::kZeros) w[i] -= zero[j];
      if constexpr (kGroups == Groups::kFlat) {
        const int64_t k =
            int64_t{unit.block} * layout::kBlockK + kStep * layout::kStepK + lane % kQuad * 2 + i % 2 + i / 2 * 8;
        w[i] *= flat_scale(p, unit.row + j * 8 + lane / kQuad, k);
      }
    }
  }
  float scale[kLaneRows];
  if constexpr (kSumEnds && kGroups != Groups::kFlat) load_values(unit.scales + values, scale);
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    const float4 v = unit.x[(kStep * kTokens + token) * (layout::kStepK / kLaneK)];
#pragma unroll
    for (int j = 0; j < kLaneRows; ++j) {
      const float (&w)[kLaneK] = weights[j / 2][j % 2];
      float& sum = sums[j][token];
      sum = kSumStarts ? w[0] * v.x : __fmaf_rn(w[0], v.x, sum);
      sum = __fmaf_rn(w[1], v.y, sum);
      sum = __fmaf_rn(w[2], v.z, sum);
      sum = __fmaf_rn(w[3], v.w, sum);
      if constexpr (kSumEnds) {
        float& total = totals[j][token];
        total = kGroups == Groups::kFlat ? total + sum : __fmaf_rn(sum, scale[j], total);
      }
    }
  }
  if constexpr (!kLast) multiply_steps<Codes, kTokens, kGroups, kStep + 1>(p, unit, lane, sums, totals);
}

// ---- sums

// Adds the four lanes of a quad: lane t keeps the sums of one of its rows, whose number in the unit is returned.
template <int kTokens>
__device__ __forceinline__ int add_quad(const float (&totals)[kLaneRows][kTokens], int lane,
                                        float (&row_sums)[kTokens]) {
  const bool upper = lane % 2 != 0, odd = lane / 2 % 2 != 0;
  float pairs[2][kTokens];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      const float other = __shfl_xor_sync(kAll, upper ? totals[j][token] : totals[j + 2][token], 1);
      pairs[j][token] = (upper ? totals[j + 2][token] : totals[j][token]) + other;
    }
  }
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    const float other = __shfl_xor_sync(kAll, odd ? pairs[0][token] : pairs[1][token], 2);
    row_sums[token] = (odd ? pairs[1][token] : pairs[0][token]) + other;
  }
  return (upper * 2 + odd) * 8 + lane / kQuad;
}

__device__ __forceinline__ void store_output(const Params& p, int64_t token, int64_t n, float value) {
  if (token >= p.m || n >= p.weight.n) return;
  if (p.bias != nullptr) value += load_float(p.bias, n, p.dtype);
  store_float(p.y, token * p.ldy + n, p.dtype, value);
}

template <class Codes, int kTokens, Groups kGroups, int kStages>
__global__ void __launch_bounds__(kThreads, 2) simt_kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int lane = threadIdx.x % layout::kLanes, warp = threadIdx.x / layout::kLanes;
  const int cluster = p.plan.cluster, rank = static_cast<int>(blockIdx.x) & (cluster - 1);
  const unsigned tile = blockIdx.x >> p.cluster_shift, token_tiles = static_cast<unsigned>(p.plan.token_tiles);
  const unsigned row_tile = tile / token_tiles, token_tile = tile % token_tiles;
  const int row_warp = warp & (p.plan.row_warps - 1), k_warps = p.k_warps, k_warp = warp >> p.row_shift;
  const int tile_rows = p.plan.tile_rows();
  const uint32_t first_row = row_tile * tile_rows, row = first_row + row_warp * kSimtUnitRows;
  const int begin = static_cast<int>(int64_t{p.blocks} * rank >> p.cluster_shift);
  const int last = static_cast<int>(int64_t{p.blocks} * (rank + 1) >> p.cluster_shift);
  const int end = row < static_cast<uint32_t>(p.weight.n) ? last : begin;  // warps beyond N have no blocks

  // Nothing of the weight was written by the kernel before: request it at once.
  launch_dependents();
  uint8_t* const memory = shared + p.memory.warps + warp * p.memory.warp_bytes;
  const UnitSource<Codes, kGroups, kTokens> source{row};
#pragma unroll 1
  for (int i = 0; i < kStages; ++i) {
    const int block = begin + k_warp + i * k_warps;
    if (block < end) source.request(p, memory + i * p.memory.stage_bytes, block, lane);
    copy_async_commit();
  }
  float* const map = reinterpret_cast<float*>(shared + p.memory.map);
  if constexpr (Codes::kIsCodebook) {
    const float value = lane < 1 << Codes::kBits ? p.codebook.value(lane) : 0.0f;
    Codes::fill_table(shared, value, threadIdx.x, kThreads);
  }
  if (p.weight.scale_type == ScaleType::kNested) {
    for (int i = threadIdx.x; i < kNestedMapSize; i += kThreads) map[i] = p.weight.nested_map[i];
  }
  wait_for_previous_kernel();

  float* const x = reinterpret_cast<float*>(shared + p.memory.x);
  const typename Codes::State state = Codes::state(shared, lane, p.weight.bias);
  float totals[kLaneRows][kTokens] = {};
  int stage = 0;
  for (int chunk = begin; chunk < last; chunk += p.plan.chunk_blocks) {
    const int chunk_end = min(chunk + p.plan.chunk_blocks, last);
    if (chunk != begin) __syncthreads();  // the last chunk was read
    load_x<kTokens>(p, x, int64_t{token_tile} * kTokens, chunk, chunk_end - chunk);
    __syncthreads();
    for (int block = chunk + k_warp; block < min(chunk_end, end); block += k_warps) {
      uint8_t* const stored = memory + stage * p.memory.stage_bytes;
      copy_async_wait<kStages - 1>();
      __syncwarp();
      if (p.memory.decoded_scales + p.memory.decoded_zeros != 0) decode_values<kGroups>(p, memory, stored, map, lane);
      Unit<Codes> unit;
      for (int atom = 0; atom < kSimtUnitAtoms; ++atom) {
        unit.words[atom].load(stored + atom * layout::atom_bytes(Codes::kBits), lane);
      }
      unit.x =
          reinterpret_cast<const float4*>(x) + (block - chunk) * (layout::kBlockK * kTokens / kLaneK) + lane % kQuad;
      unit.state = state;
      unit.row = row;
      unit.block = block;
      const auto values = [&](const uint8_t* of) { return reinterpret_cast<const float4*>(of) + lane / kQuad; };
      unit.scales = values(p.memory.decoded_scales != 0 ? memory + p.memory.decoded_scales : stored + p.memory.scales);
      unit.zeros = values(memory + p.memory.decoded_zeros);
      float sums[kLaneRows][kTokens];
      multiply_steps<Codes, kTokens, kGroups>(p, unit, lane, sums, totals);
      __syncwarp();  // the stage was read
      const int next = block + kStages * k_warps;
      if (next < end) source.request(p, stored, next, lane);
      copy_async_commit();
      stage = stage + 1 < kStages ? stage + 1 : 0;
    }
  }
  copy_async_wait<0>();

  // Over x, [k warp][token][row of the tile]; then the thread block's sums, [token][row].
  const int count = kTokens * tile_rows;
  float row_sums[kTokens];
  const int row_in_unit = add_quad<kTokens>(totals, lane, row_sums);
  __syncthreads();
  for (int token = 0; token < kTokens; ++token) {
    x[(k_warp * kTokens + token) * tile_rows + row_warp * kSimtUnitRows + row_in_unit] = row_sums[token];
  }
  __syncthreads();
  float* const block_sums = x + k_warps * count;
  const auto store = [&](int i, float sum) {
    store_output(p, int64_t{token_tile} * kTokens + i / tile_rows, first_row + i % tile_rows, sum);
  };
  for (int i = threadIdx.x; i < count; i += kThreads) {
    float sum = x[i];
    for (int part = 1; part < k_warps; ++part) sum += x[part * count + i];
    if (cluster == 1) {
      store(i, sum);
    } else {
      block_sums[i] = sum;
    }
  }
  if (cluster == 1) return;
  cluster_sync();
  for (int i = rank * kThreads + threadIdx.x; i < count; i += cluster * kThreads) {
    float sum = 0.0f;
    for (int part = 0; part < cluster; ++part) sum += load_from_cta(block_sums + i, part);
    store(i, sum);
  }
  cluster_wait_for_all();  // the others read this one's shared memory
}

// ---- launches

// x in shared memory, at most: a batch of load_x, so that its latency is paid once.
constexpr int kXBytes = 16 << 10;

template <class Codes, int kTokens, Groups kGroups>
const char* run(const GemmProblem& problem) {
  const Weight& w = problem.weight;
  const DeviceProperties& device = device_properties();
  const int64_t packed_groups = layout::packed_groups(w.k, w.group_size);
  Params p{};
  p.weight = w;
  p.codebook = CodebookParameter::of(w);
  p.x = problem.x;
  p.y = problem.y;
  p.bias = problem.bias;
  p.ldx = problem.ldx;
  p.ldy = problem.ldy;
  p.m = problem.m;
  p.dtype = problem.dtype;
  p.x_pairs = w.k % 2 == 0 && problem.ldx % 2 == 0 &&
              reinterpret_cast<uintptr_t>(problem.x) % (2 * size_of(problem.dtype)) == 0;
  p.blocks = static_cast<int>(layout::blocks_along_k(w.k));
  // Group sizes other than K are powers of two; with one group, every k is in group 0.
  while (p.group_shift < 31 && (packed_groups == 1 && !w.flat_scales || int64_t{2} << p.group_shift <= w.group_size)) {
    ++p.group_shift;
  }
  p.groups = kGroups == Groups::kSteps ? static_cast<int>(layout::kBlockK / w.group_size) : 1;
  p.row_groups = static_cast<uint32_t>(w.groups());
  p.packed_groups = static_cast<uint32_t>(packed_groups);
  static_assert(Codes::kTableBytes == simt_table_bytes(Codes::kIsCodebook, Codes::kBits));
  p.memory = simt_memory(w, p.groups, kTokens, device.shared_bytes);
  p.plan = plan_simt(problem.m, w.n, w.k, kTokens, std::min(kXBytes, device.shared_bytes - p.memory.x), device.sms,
                     device.clusters);
  while (1 << p.cluster_shift < p.plan.cluster) ++p.cluster_shift;
  while (1 << p.row_shift < p.plan.row_warps) ++p.row_shift;
  p.k_warps = p.plan.k_warps();
  const int x_bytes = p.plan.chunk_blocks * layout::kBlockK * kTokens * static_cast<int>(sizeof(float));
  const int shared_bytes = p.memory.x + std::max(x_bytes, simt_sum_bytes(kTokens, p.plan.tile_rows()));
  if (shared_bytes > device.shared_bytes) return "simt: the device has too little shared memory";
  if (p.plan.thread_blocks() > INT32_MAX) return "simt: too many thread blocks";
  const LaunchShape shape{static_cast<unsigned>(p.plan.thread_blocks()),  kThreads,      shared_bytes, p.plan.cluster,
                          problem.programmatic_launch && device.clusters, problem.stream};
  constexpr int kMost = simt_stages(Codes::kBits);
  if constexpr (kGroups == Groups::kSteps && simt_may_have_few_stages(Codes::kBits, kTokens)) {
    if (p.memory.stages != kMost) return launch(&simt_kernel<Codes, kTokens, kGroups, kSimtFewStages>, shape, p);
  }
  return launch(&simt_kernel<Codes, kTokens, kGroups, kMost>, shape, p);
}

template <class Codes, Groups kGroups>
const char* run_groups(const GemmProblem& p) {
  if (p.m == 1) return run<Codes, 1, kGroups>(p);
  if constexpr (kGroups == Groups::kWhole) {
    if (p.m == 2) return run<Codes, 2, kGroups>(p);
  }
  if (p.m <= 4 || simt_most_tokens(device_properties().shared_bytes) == 4) return run<Codes, 4, kGroups>(p);
  return run<Codes, 8, kGroups>(p);
}

template <class Codes>
const char* run_codes(const GemmProblem& p) {
  if constexpr (Codes::kIsCodebook) {
    // Rare: blocks of a codebook format across row ends.
    if (p.weight.flat_scales) return run<Codes, 4, Groups::kFlat>(p);
  }
  const bool whole = p.weight.group_size >= layout::kBlockK || p.weight.groups() == 1;
  return whole ? run_groups<Codes, Groups::kWhole>(p) : run_groups<Codes, Groups::kSteps>(p);
}

const char* simt_gemm(const GemmProblem& p) {
  const Weight& w = p.weight;
  const bool zeros = w.zero_type != ZeroType::kNone;
  if (!w.is_codebook && w.bits == 4) {
    return zeros ? run_codes<IntegerCodes<4, true>>(p) : run_codes<IntegerCodes<4, false>>(p);
  }
  if (!w.is_codebook) return run_codes<IntegerCodes<8, false>>(p);
  switch (w.bits) {
    case 2:
      return run_codes<CodebookCodes<2>>(p);
    case 3:
      return run_codes<CodebookCodes<3>>(p);
    case 4:
      return run_codes<CodebookCodes<4>>(p);
    default:
      return run_codes<CodebookCodes<5>>(p);
  }
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % layout::kMaxPieceBytes == 0; }

// UnitSource's numbers. There are no more pieces of scales than of codes: a group has 16 k at least, a code 2 bits.
bool fits_32_bits(const Weight& w) {
  return w.n <= INT32_MAX && layout::packed_code_bytes(w.n, w.k, w.bits) / 16 <= UINT32_MAX &&
         (w.scale_type != ScaleType::kNested || w.n * w.groups() <= UINT32_MAX);
}

// Only codebooks have nested scales: UnitSource.
constexpr bool formats_as_compiled() {
  for (const Format& format : kFormats) {
    if (format.encoding != Encoding::kCodebook &&
        (format.scale_types >> static_cast<int>(ScaleType::kNested) & 1) != 0) {
      return false;
    }
  }
  return true;
}
static_assert(formats_as_compiled());

template <DType kDType>
bool simt_supports(const GemmProblem& p) {
  const bool int8_zeros = p.weight.bits == 8 && p.weight.zero_type != ZeroType::kNone;  // no format has them
  return p.dtype == kDType && !int8_zeros && fits_32_bits(p.weight) && is_aligned(p.weight.codes) &&
         is_aligned(p.weight.scales) && is_aligned(p.weight.zeros);
}

}  // namespace
}  // namespace cuda

// One kernel: the types of x and y are known at run time. Three names, so that a table can tell them apart.
extern const Instance cuda_simt_fp32;
extern const Instance cuda_simt_fp16;
extern const Instance cuda_simt_bf16;
const Instance cuda_simt_fp32 = {
    "cuda_simt_fp32", Device::kCuda,    Family::kSimt, &cuda::device_available, &cuda::simt_supports<DType::kFp32>,
    nullptr,          &cuda::simt_gemm, nullptr};
const Instance cuda_simt_fp16 = {
    "cuda_simt_fp16", Device::kCuda,    Family::kSimt, &cuda::device_available, &cuda::simt_supports<DType::kFp16>,
    nullptr,          &cuda::simt_gemm, nullptr};
const Instance cuda_simt_bf16 = {
    "cuda_simt_bf16", Device::kCuda,    Family::kSimt, &cuda::device_available, &cuda::simt_supports<DType::kBf16>,
    nullptr,          &cuda::simt_gemm, nullptr};

}  // namespace cutlass_ext
