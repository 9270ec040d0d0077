// One pass over w: lanes of a warp share a group, find its range, store its scale and then its codes, eight codes
// (kBits whole bytes) at a time. Groups of up to 512 weights stay in registers; longer ones are read twice, the second
// time from a cache. Where flat groups cross row ends, scales and codes are two passes: codes are packed row by row.
#include <cmath>

#include "kernels/cuda/launch.hpp"
#include "kernels/cuda/nested_absmax.hpp"
#include "kernels/cuda/quantize.hpp"
#include "kernels/cuda/search_tree.hpp"
#include "kernels/encode.hpp"

namespace cutlass_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kChunk = 8;   // weights of a thread at a time
constexpr int kChunks = 2;  // of a thread, where groups are short: what a scale costs is shared by 16 weights
constexpr int kMaxGridY = 65535;
constexpr uint32_t kInfinity = 0x7F800000u;

// ---- values of w

// How many of a chunk's weights there are, with `left` before the end.
__device__ __forceinline__ int clamp_count(int64_t left) {
  return left >= kChunk ? kChunk : left > 0 ? static_cast<int>(left) : 0;
}

template <DType kType>
__device__ __forceinline__ void load_chunk(const void* w, int64_t index, int count, bool vectors,
                                           float (&values)[kChunk]) {
  if (vectors && count >= kChunk) {
    if constexpr (kType == DType::kFp32) {
      const auto* from = reinterpret_cast<const float4*>(static_cast<const float*>(w) + index);
      const float4 low = from[0], high = from[1];
      values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
      values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
    } else {
      const uint4 raw = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(w) + index);
      const uint32_t words[] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if constexpr (kType == DType::kBf16) {
          values[i] = __uint_as_float(i % 2 ? words[i / 2] & 0xFFFF0000u : words[i / 2] << 16);
        } else {
          values[i] = fp16_to_float(static_cast<uint16_t>(words[i / 2] >> i % 2 * 16));
        }
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) values[i] = i < count ? load_float(w, index + i, kType) : 0.0f;
  }
}

// ---- the range of a group

// Largest |w| (of positive floats the bits order as the numbers do, and NaN is above Inf), and for asymmetric formats
// the range.
struct Range {
  uint32_t absmax = 0;
  float low = INFINITY, high = -INFINITY;

  template <bool kAsymmetric>
  __device__ __forceinline__ void add(const float (&values)[kChunk], int count) {
    // Values beyond the end are 0.
#pragma unroll
    for (int i = 0; i < kChunk; ++i) absmax = max(absmax, __float_as_uint(values[i]) & 0x7FFFFFFFu);
    if constexpr (kAsymmetric) {
      if (count >= kChunk) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) low = fminf(low, values[i]), high = fmaxf(high, values[i]);
      } else {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          if (i < count) low = fminf(low, values[i]), high = fmaxf(high, values[i]);
        }
      }
    }
  }
  // Over `lanes` neighbouring lanes, a power of two.
  template <bool kAsymmetric>
  __device__ __forceinline__ void share(int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      absmax = max(absmax, __shfl_xor_sync(0xFFFFFFFFu, absmax, distance));
      if (kAsymmetric) {
        low = fminf(low, __shfl_xor_sync(0xFFFFFFFFu, low, distance));
        high = fmaxf(high, __shfl_xor_sync(0xFFFFFFFFu, high, distance));
      }
    }
  }
};

// ---- scales

struct Parameters {
  Weight weight;
  float steps;
  float largest;         // largest |entry| of the codebook
  int largest_exponent;  // floor(log2(largest))
  const void* w;
  int64_t n, k;  // of w as the kernel sees it: one row where flat groups cross row ends
  int64_t ld;
  bool vectors;  // rows of w are aligned to 16 bytes
  bool words;    // rows of codes are aligned to 8 bytes
  int64_t row_bytes;
  int64_t groups;  // of a row
  int64_t group_size;
  int lanes_log2;        // lanes that share a group
  int row_threads_log2;  // threads of a block that share a row
  int group_shift;       // flat groups that cross row ends
  float* absmax;         // nested: one per group
  QuantizeStatus* status;
};

// 1 / scale, and 0 where that is not finite, so that a group of zeros becomes zeros.
__device__ __forceinline__ float reciprocal(float scale) {
  const float inverse = __frcp_rn(scale);
  return (__float_as_uint(inverse) & 0x7FFFFFFFu) < kInfinity ? inverse : 0.0f;
}

// Stores a floating-point scale if `store`, and returns it as it will decode.
__device__ float store_float_scale(const Parameters& p, int64_t group, float scale, bool store) {
  const DType type = float_type(p.weight.scale_type);
  if (store) store_float(const_cast<void*>(p.weight.scales), group, type, scale);
  const float decoded = round_to(type, scale);
  if (store && (__float_as_uint(decoded) & 0x7FFFFFFFu) >= kInfinity) {
    atomicMax(&p.status->large_scale, __float_as_uint(scale));
  }
  return decoded;
}

// What codes are computed with: q = round(w * inverse + zero) for integers.
struct GroupScale {
  float inverse;
  float zero;
};

__device__ GroupScale codebook_scale(const Parameters& p, int64_t group, float absmax, bool store) {
  auto* bytes = static_cast<uint8_t*>(const_cast<void*>(p.weight.scales));
  uint8_t code;
  float scale;
  switch (p.weight.scale_type) {
    case ScaleType::kE8M0:
      code = absmax > 0 ? exponent_to_e8m0(exponent_of(absmax) - p.largest_exponent) : 0;
      scale = e8m0_to_float(code);
      break;
    case ScaleType::kE4M3: {
      const float tensor_scale = *p.weight.tensor_scale;
      code = float_to_e4m3(__fdiv_rn(__fdiv_rn(absmax, p.largest), tensor_scale));
      scale = __fmul_rn(e4m3_to_float(code), tensor_scale);
      break;
    }
    case ScaleType::kE4M4:
      code = float_to_e4m4(absmax);
      scale = e4m4_to_float(code);
      break;
    case ScaleType::kNested:  // bitsandbytes chooses codes before it nests; so do we, for equal codes
      if (store) p.absmax[group] = absmax;
      return {reciprocal(absmax), 0};
    default:
      return {reciprocal(store_float_scale(p, group, absmax, store)), 0};
  }
  if (store) bytes[group] = code;
  return {reciprocal(scale), 0};
}

__device__ GroupScale asymmetric_scale(const Parameters& p, int64_t group, float low, float high, float largest_code,
                                       bool store) {
  const bool integer = p.weight.zero_type == ZeroType::kInteger;
  if (integer) low = fminf(low, 0.0f), high = fmaxf(high, 0.0f);  // so that the zero point is one of the codes
  // A constant group: its value is one step away from the zero point.
  const float span = high > low ? __fdiv_rn(__fsub_rn(high, low), largest_code) : fabsf(low);
  const float inverse = reciprocal(store_float_scale(p, group, span, store));
  float zero = __fmul_rn(-low, inverse);
  void* zeros = const_cast<void*>(p.weight.zeros);
  if (integer) {
    zero = fminf(fmaxf(rintf(zero), 0.0f), largest_code);
    if (store) static_cast<uint8_t*>(zeros)[group] = static_cast<uint8_t>(zero);
  } else {
    const DType type = float_type(p.weight.scale_type);
    if (store) store_float(zeros, group, type, zero);
    zero = round_to(type, zero);
  }
  return {inverse, zero};
}

// ---- codes

// How a format's scales and codes come from numbers.
template <Encoding kEncoding_, int kBits_>
struct Coder {
  static constexpr Encoding kEncoding = kEncoding_;
  static constexpr int kBits = kBits_;
  static constexpr bool kAsymmetric = kEncoding == Encoding::kUnsigned;
  __device__ static GroupScale scale(const Parameters& p, int64_t group, const Range& range, bool store) {
    const float absmax = __uint_as_float(range.absmax);
    if (store && range.absmax >= kInfinity) atomicMax(&p.status->non_finite, 1u);
    if constexpr (kEncoding == Encoding::kCodebook) {
      return codebook_scale(p, group, absmax, store);
    } else if constexpr (kAsymmetric) {
      return asymmetric_scale(p, group, range.low, range.high, (1 << kBits) - 1, store);
    } else {
      return {reciprocal(store_float_scale(p, group, __fdiv_rn(absmax, p.steps), store)), 0};
    }
  }

  __device__ static __forceinline__ uint32_t code(const SearchTree<kBits <= 5 ? kBits : 2>& tree,
                                                  const SearchTable<kBits <= 5 ? kBits : 2>& table, float value,
                                                  GroupScale scale) {
    const float x = __fmul_rn(value, scale.inverse);
    if constexpr (kEncoding == Encoding::kCodebook) {
      return nearest(tree, table, x);
    } else if constexpr (kAsymmetric) {
      constexpr float kLargest = (1 << kBits) - 1;
      const float q = rintf(__fadd_rn(x, scale.zero));
      return static_cast<uint32_t>(fminf(fmaxf(q, 0.0f), kLargest));
    } else {
      constexpr float kHalf = 1 << (kBits - 1);
      const float q = fminf(fmaxf(rintf(x), -kHalf), kHalf - 1);
      return static_cast<uint32_t>(static_cast<int>(q)) & ((1u << kBits) - 1);
    }
  }
};

// Eight codes, side by side.
template <int kBits>
using CodeChunk = std::conditional_t<(kBits > 4), uint64_t, uint32_t>;

// Stores the first `count` of eight codes; unused bits of the last byte are 0.
template <int kBits>
__device__ __forceinline__ void store_codes(uint8_t* to, CodeChunk<kBits> codes, int count, bool words) {
  using Word = std::conditional_t<kBits == 2, uint16_t, CodeChunk<kBits>>;
  if (kBits % 2 == 0 && words && count >= kChunk) {
    *reinterpret_cast<Word*>(to) = static_cast<Word>(codes);
    return;
  }
  if (count < kChunk) codes &= (CodeChunk<kBits>{1} << count * kBits) - 1;
  const int bytes = count >= kChunk ? kBits : (count * kBits + 7) / 8;
#pragma unroll
  for (int i = 0; i < kBits; ++i) {
    if (i < bytes) to[i] = static_cast<uint8_t>(codes >> 8 * i);
  }
}

template <class Coder>
using TreeOf = SearchTree<Coder::kBits <= 5 ? Coder::kBits : 2>;
template <class Coder>
using TableOf = SearchTable<Coder::kBits <= 5 ? Coder::kBits : 2>;

template <class Coder>
__device__ __forceinline__ void encode_chunk(const Parameters& p, const TreeOf<Coder>& tree,
                                             const TableOf<Coder>& table, const float (&values)[kChunk],
                                             GroupScale scale, int64_t n, int64_t k, int count) {
  using Codes = CodeChunk<Coder::kBits>;
  Codes codes = 0;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) codes |= Codes{Coder::code(tree, table, values[i], scale)} << Coder::kBits * i;
  auto* to = const_cast<uint8_t*>(p.weight.codes) + n * p.row_bytes + k * Coder::kBits / 8;
  store_codes<Coder::kBits>(to, codes, count, p.words);
}

// ---- kernels

// Groups of at most 512 weights: 2^lanes_log2 lanes of two chunks each, all in registers.
template <class Coder, DType kType, bool kCodes>
__global__ void __launch_bounds__(kThreads)
    quantize_groups(const __grid_constant__ Parameters p, const __grid_constant__ TreeOf<Coder> tree) {
  __shared__ TableOf<Coder> table;
  if constexpr (kCodes && Coder::kEncoding == Encoding::kCodebook) {
    table.fill(tree);
    __syncthreads();
  }
  const int row_threads = 1 << p.row_threads_log2, lanes = 1 << p.lanes_log2;
  const int64_t column = int64_t{blockIdx.x} * row_threads + (threadIdx.x & (row_threads - 1));
  const int64_t group = column >> p.lanes_log2;
  const int lane = static_cast<int>(column) & (lanes - 1);
  const int64_t first = group * p.group_size;
  const int64_t length = group < p.groups ? min(p.group_size, p.k - first) : 0;
  int counts[kChunks];
#pragma unroll
  for (int j = 0; j < kChunks; ++j) counts[j] = clamp_count(length - (j * lanes + lane) * kChunk);
  const int block_rows = kThreads >> p.row_threads_log2, row = threadIdx.x >> p.row_threads_log2;
  for (int64_t base = int64_t{blockIdx.y} * block_rows; base < p.n; base += int64_t{gridDim.y} * block_rows) {
    const int64_t n = base + row;
    const bool inside = n < p.n && length > 0;
    float values[kChunks][kChunk] = {};
    Range range;
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      if (inside && counts[j] > 0) {
        load_chunk<kType>(p.w, n * p.ld + first + (j * lanes + lane) * kChunk, counts[j], p.vectors, values[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kChunks; ++j) range.template add<Coder::kAsymmetric>(values[j], counts[j]);
    range.template share<Coder::kAsymmetric>(lanes);
    if (!inside) continue;
    const GroupScale scale = Coder::scale(p, n * p.groups + group, range, lane == 0);
    if constexpr (kCodes) {
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        if (counts[j] > 0) {
          encode_chunk<Coder>(p, tree, table, values[j], scale, n, first + (j * lanes + lane) * kChunk, counts[j]);
        }
      }
    }
  }
}

// Longer groups: a warp each, read twice.
template <class Coder, DType kType, bool kCodes>
__global__ void __launch_bounds__(kThreads)
    quantize_long_groups(const __grid_constant__ Parameters p, const __grid_constant__ TreeOf<Coder> tree) {
  __shared__ TableOf<Coder> table;
  if constexpr (kCodes && Coder::kEncoding == Encoding::kCodebook) {
    table.fill(tree);
    __syncthreads();
  }
  // 32 bits, so that the division is no call: 2^32 groups of more than 512 weights fit no memory.
  const uint32_t index = blockIdx.x * kWarps + threadIdx.x / kWarpSize, groups = static_cast<uint32_t>(p.groups);
  const int lane = threadIdx.x % kWarpSize;
  if (index >= p.n * p.groups) return;
  const int64_t n = index / groups, first = index % groups * p.group_size;
  const int64_t length = min(p.group_size, p.k - first);
  Range range;
#pragma unroll 4
  for (int64_t i = lane * kChunk; i < length; i += kWarpSize * kChunk) {
    float values[kChunk];
    const int count = clamp_count(length - i);
    load_chunk<kType>(p.w, n * p.ld + first + i, count, p.vectors, values);
    range.template add<Coder::kAsymmetric>(values, count);
  }
  range.template share<Coder::kAsymmetric>(kWarpSize);
  const GroupScale scale = Coder::scale(p, index, range, lane == 0);
  if constexpr (kCodes) {
#pragma unroll 2
    for (int64_t i = lane * kChunk; i < length; i += kWarpSize * kChunk) {
      float values[kChunk];
      const int count = clamp_count(length - i);
      load_chunk<kType>(p.w, n * p.ld + first + i, count, p.vectors, values);
      encode_chunk<Coder>(p, tree, table, values, scale, n, first + i, count);
    }
  }
}

// Codes for flat groups that cross row ends, from the stored scales: a chunk reaches into at most two groups.
template <class Coder, DType kType>
__global__ void __launch_bounds__(kThreads)
    encode_flat(const __grid_constant__ Parameters p, const __grid_constant__ TreeOf<Coder> tree) {
  __shared__ TableOf<Coder> table;
  table.fill(tree);
  __syncthreads();
  const int64_t k = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kChunk;
  const int count = clamp_count(p.k - k);
  if (count == 0) return;
  const auto inverse_of = [&](int64_t group) {
    return reciprocal(p.absmax != nullptr ? p.absmax[group] : decode_scale(p.weight, group, group));
  };
  for (int64_t n = blockIdx.y; n < p.n; n += gridDim.y) {
    const int64_t start = n * p.ld + k;
    float values[kChunk];
    load_chunk<kType>(p.w, start, count, p.vectors, values);
    const int64_t group = start >> p.group_shift, last = (start + count - 1) >> p.group_shift;
    const float first = inverse_of(group), second = group == last ? first : inverse_of(last);
    using Codes = CodeChunk<Coder::kBits>;
    Codes codes = 0;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const GroupScale scale{(start + i) >> p.group_shift == group ? first : second, 0};
      codes |= Codes{Coder::code(tree, table, values[i], scale)} << Coder::kBits * i;
    }
    auto* to = const_cast<uint8_t*>(p.weight.codes) + n * p.row_bytes + k * Coder::kBits / 8;
    store_codes<Coder::kBits>(to, codes, count, p.words);
  }
}

template <DType kType>
__global__ void __launch_bounds__(kThreads) find_absmax(const __grid_constant__ Parameters p) {
  const int64_t k = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kChunk;
  const int count = clamp_count(p.k - k);
  Range range;
  for (int64_t n = blockIdx.y; n < p.n; n += gridDim.y) {
    if (count <= 0) continue;
    float values[kChunk];
    load_chunk<kType>(p.w, n * p.ld + k, count, p.vectors, values);
    range.template add<false>(values, count);
  }
  range.template share<false>(kWarpSize);
  // Most find a larger value there already.
  if (threadIdx.x % kWarpSize == 0 && range.absmax > *const_cast<volatile uint32_t*>(&p.status->absmax)) {
    atomicMax(&p.status->absmax, range.absmax);
  }
}

// The factor that maps the largest scale of a group to E4M3's largest value.
__global__ void store_tensor_scale(const __grid_constant__ Parameters p) {
  const float absmax = __uint_as_float(p.status->absmax);
  *const_cast<float*>(p.weight.tensor_scale) = absmax > 0 ? __fdiv_rn(absmax, __fmul_rn(p.largest, 448.0f)) : 1.0f;
}

// ---- launches

int ceil_log2(int64_t value) {
  int log2 = 0;
  while ((int64_t{1} << log2) < value) ++log2;
  return log2;
}

dim3 grid_of(int64_t columns, int64_t rows) {
  return {static_cast<unsigned>(columns), static_cast<unsigned>(std::min<int64_t>(rows, kMaxGridY))};
}

template <class Coder, DType kType, bool kCodes>
void launch_groups(Parameters p, const TreeOf<Coder>& tree, cudaStream_t stream) {
  const int64_t length = std::min(p.group_size, p.k);
  if (length > kWarpSize * kChunks * kChunk) {
    const auto grid = static_cast<unsigned>(layout::ceil_div(p.n * p.groups, kWarps));
    quantize_long_groups<Coder, kType, kCodes><<<grid, kThreads, 0, stream>>>(p, tree);
    return;
  }
  p.lanes_log2 = ceil_log2(layout::ceil_div(length, kChunks * kChunk));
  const int64_t columns = p.groups << p.lanes_log2;
  p.row_threads_log2 = std::min(ceil_log2(columns), ceil_log2(kThreads));
  const auto grid = grid_of(layout::ceil_div(columns, int64_t{1} << p.row_threads_log2),
                            layout::ceil_div(p.n, kThreads >> p.row_threads_log2));
  quantize_groups<Coder, kType, kCodes><<<grid, kThreads, 0, stream>>>(p, tree);
}

template <class Coder, DType kType>
void launch(const Parameters& p, bool ties_to_even, cudaStream_t stream) {
  TreeOf<Coder> tree{};
  if constexpr (Coder::kEncoding == Encoding::kCodebook) tree = TreeOf<Coder>::of(p.weight.codebook, ties_to_even);
  const auto by_rows = grid_of(layout::ceil_div(p.k, kThreads * kChunk), p.n);
  if (p.weight.tensor_scale != nullptr) {
    constexpr int64_t kBlocks = 2048;  // a few for each multiprocessor
    const auto grid = grid_of(by_rows.x, std::min(p.n, layout::ceil_div(kBlocks, by_rows.x)));
    find_absmax<kType><<<grid, kThreads, 0, stream>>>(p);
    store_tensor_scale<<<1, 1, 0, stream>>>(p);
  }
  if (!p.weight.flat_scales) return launch_groups<Coder, kType, true>(p, tree, stream);
  if constexpr (Coder::kEncoding == Encoding::kCodebook) {
    Parameters flat = p;
    flat.n = 1;
    flat.k = p.n * p.k;
    flat.groups = layout::ceil_div(flat.k, p.group_size);
    launch_groups<Coder, kType, false>(flat, tree, stream);
    encode_flat<Coder, kType><<<by_rows, kThreads, 0, stream>>>(p, tree);
  }
}

template <class Coder>
void launch(const QuantizeProblem& problem, const Parameters& p) {
  const auto stream = static_cast<cudaStream_t>(problem.stream);
  switch (problem.dtype) {
    case DType::kFp32:
      return launch<Coder, DType::kFp32>(p, problem.ties_to_even, stream);
    case DType::kFp16:
      return launch<Coder, DType::kFp16>(p, problem.ties_to_even, stream);
    default:
      return launch<Coder, DType::kBf16>(p, problem.ties_to_even, stream);
  }
}

void launch(const QuantizeProblem& problem, const Parameters& p) {
  const Weight& w = p.weight;
  if (!w.is_codebook) {
    if (w.bias == 0) return launch<Coder<Encoding::kUnsigned, 4>>(problem, p);
    return w.bits == 4 ? launch<Coder<Encoding::kSigned, 4>>(problem, p)
                       : launch<Coder<Encoding::kSigned, 8>>(problem, p);
  }
  switch (w.bits) {
    case 2:
      return launch<Coder<Encoding::kCodebook, 2>>(problem, p);
    case 3:
      return launch<Coder<Encoding::kCodebook, 3>>(problem, p);
    case 4:
      return launch<Coder<Encoding::kCodebook, 4>>(problem, p);
    default:
      return launch<Coder<Encoding::kCodebook, 5>>(problem, p);
  }
}

int64_t block_count(const Weight& w) {
  return w.flat_scales ? layout::ceil_div(w.n * w.k, w.group_size) : w.n * w.groups();
}

}  // namespace

size_t quantize_workspace(const Weight& w) {
  if (w.scale_type != ScaleType::kNested) return 0;
  return nested_workspace(block_count(w));
}

const char* quantize(const QuantizeProblem& problem) {
  const Weight& w = problem.weight;
  const auto stream = static_cast<cudaStream_t>(problem.stream);
  const bool nested = w.scale_type == ScaleType::kNested;
  Parameters p{};
  p.weight = w;
  p.steps = problem.steps;
  if (w.is_codebook) {
    for (int i = 0; i < 1 << w.bits; ++i) p.largest = std::max(p.largest, std::fabs(w.codebook[i]));
    p.largest_exponent = exponent_of(p.largest);
  }
  p.w = problem.w;
  p.n = w.n;
  p.k = w.k;
  p.ld = problem.ld;
  p.vectors = is_aligned(p.w, 16) && p.ld * size_of(problem.dtype) % 16 == 0;
  p.row_bytes = layout::ceil_div(w.k * w.bits, 8);
  p.words = is_aligned(w.codes, 8) && p.row_bytes % 8 == 0;
  p.groups = w.groups();
  p.group_size = w.group_size;
  p.group_shift = w.flat_scales ? __builtin_ctzll(static_cast<uint64_t>(w.group_size)) : 0;
  p.absmax = nested ? absmax_to_nest(problem.workspace) : nullptr;
  p.status = problem.status;
  cudaMemsetAsync(problem.status, 0, sizeof(QuantizeStatus), stream);
  launch(problem, p);
  if (nested) nest_absmax(problem.workspace, block_count(w), w, problem.status, stream);
  return launch_error();
}

}  // namespace cutlass_ext::cuda
