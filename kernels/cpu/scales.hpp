// The scales and zeros of one slab as fp32, decoded for a run of blocks at a time.
#pragma once

#include <cstdint>

#include "kernels/cpu/codes.hpp"
#include "kernels/decode.hpp"

namespace cutlass_ext::cpu {

// How scales lie over a block.
enum class Groups {
  kWhole,  // one scale per row: groups of a multiple of 64, or one group
  kSteps,  // groups of 16 or 32: two or four scales per row
  kFlat,   // groups cross row ends and begin anywhere
};

// Integer formats have no flat groups and flat formats no zeros (kernels/format.hpp), which the choice of a
// specialization (weight_kind.hpp) relies on.
static inline Groups groups_of(const Weight& w) {
  if (w.flat_scales) return Groups::kFlat;
  return w.group_size >= w.k || w.group_size % layout::kBlockK == 0 ? Groups::kWhole : Groups::kSteps;
}

// Blocks of a run: 32 KB of 4-bit codes, and a run's scales stay in the L1 cache.
constexpr int kRunBlocks = 8;

struct ByteScales {
  float values[256];
};
template <class Isa>
static CX_INLINE const float* byte_scale_values(const Weight& w, ByteScales& buffer) {
  if (w.scale_type == ScaleType::kNested) return w.nested_map;
  for (int i = 0; i < 256; ++i) {
    const uint8_t s = static_cast<uint8_t>(i);
    buffer.values[i] = w.scale_type == ScaleType::kE4M4   ? e4m4_to_float(s)
                       : w.scale_type == ScaleType::kE4M3 ? e4m3_to_float(s) * tensor_scale(w)
                                                          : e8m0_to_float(s);
  }
  return buffer.values;
}

template <class Isa, Groups kGroups, bool kZeros>
class SlabScales {
  using F = typename Isa::F;

 public:
  explicit SlabScales(const Weight& w) : weight_(w) {
    if (size_of(w.scale_type) == 1) byte_values_ = byte_scale_values<Isa>(w, byte_buffer_);
    // Groups shorter than K are powers of two. A division here would take as long as the products of a row pair.
    group_shift_ = w.group_size >= w.k ? 62 : __builtin_ctzll(static_cast<uint64_t>(w.group_size));
    step_offset_[0] = 0;
    for (int step = 1; step < layout::kSteps; ++step) {
      step_offset_[step] =
          kGroups == Groups::kSteps ? static_cast<int>(step * layout::kStepK / w.group_size) * layout::kBlockRows : 0;
    }
  }

  void start_slab(int64_t slab) {
    slab_ = slab;
    nested_end_ = -1;
  }

  // Decodes what blocks [first, last) need; at most kRunBlocks blocks.
  void decode(int64_t first, int64_t last) {
    if constexpr (kGroups == Groups::kFlat) return;
    const Weight& w = weight_;
    first_group_ = first_group(first);
    const int64_t end = kGroups == Groups::kWhole ? first_group(last - 1) + 1 : first_group(last);
    const int64_t groups = layout::ceil_div(w.k, w.group_size);
    for (int64_t group = first_group_; group < end; ++group) {
      float* scales = scales_ + (group - first_group_) * layout::kBlockRows;
      float* zeros = zeros_ + (group - first_group_) * layout::kBlockRows;
      if (group >= groups) {  // beyond K: x is zero there, the weight must only be finite
        for (int i = 0; i < layout::kBlockRows; i += kVector) {
          Isa::store(scales + i, Isa::zero());
          if constexpr (kZeros) Isa::store(zeros + i, Isa::zero());
        }
        continue;
      }
      const int64_t index = (slab_ * layout::packed_groups(w.k, w.group_size) + group) * layout::kBlockRows;
      if (size_of(w.scale_type) == 1) {
        decode_bytes(index, group, scales);
      } else {
        decode_floats(w.scales, index, scales);
      }
      if constexpr (kZeros) {
        if (w.zero_type == ZeroType::kInteger) {
          const uint8_t* bytes = static_cast<const uint8_t*>(w.zeros) + index;
          for (int i = 0; i < layout::kBlockRows; i += kVector) {
            Isa::store(zeros + i, Isa::to_float(Isa::load_bytes(bytes + i)));
          }
        } else {
          decode_floats(w.zeros, index, zeros);
        }
      }
    }
  }

  // Scale of one row of a block; the row stands at `position` of the packed scales. Not for flat groups.
  CX_INLINE F row_scale(int64_t block, int position) const { return row_vector(scales_, block, position); }
  CX_INLINE F row_zero(int64_t block, int position) const { return row_vector(zeros_, block, position); }

  // Decoded scales (zeros) of the group that holds k16 step `step` of a block, in packed order. Not for flat groups.
  CX_INLINE const float* step_scales(int64_t block, int step) const {
    return scales_ + group_offset(block) + step_offset_[step];
  }
  CX_INLINE const float* step_zeros(int64_t block, int step) const {
    return zeros_ + group_offset(block) + step_offset_[step];
  }

  // Scales of the row in four slots, where groups are flat.
  CX_INLINE void flat_row(int64_t block, int row_in_slab, F (&scale)[kSlots]) const {
    const Weight& w = weight_;
    const int64_t n = slab_ * layout::kBlockRows + row_in_slab;
    if (n >= w.n) {
      for (int slot = 0; slot < kSlots; ++slot) scale[slot] = Isa::zero();
      return;
    }
    const int64_t start = n * w.k + block * layout::kBlockK;
    const int64_t left = w.k - block * layout::kBlockK;
    const int count = left < layout::kBlockK ? static_cast<int>(left) : layout::kBlockK;
    alignas(64) float natural[layout::kBlockK] = {};
    int64_t group = start / w.group_size;
    int64_t end = (group + 1) * w.group_size - start;
    float value = flat_scale(group);
    for (int k = 0; k < count; ++k) {
      if (k == end) {
        value = flat_scale(++group);
        end += w.group_size;
      }
      natural[k] = value;
    }
    to_slots(natural, scale);
  }

  // 64 consecutive k to the vectors of the four slots.
  static CX_INLINE void to_slots(const float* natural, F (&slots)[kSlots]) {
    for (int slot = 0; slot < kSlots; ++slot) {
      alignas(64) float permuted[kVector];
      for (int e = 0; e < kVector; ++e) permuted[e] = natural[slot_k(slot, e)];
      slots[slot] = Isa::load(permuted);
    }
  }

 private:
  CX_INLINE int64_t first_group(int64_t block) const { return block * layout::kBlockK >> group_shift_; }
  CX_INLINE int64_t group_offset(int64_t block) const {
    return (first_group(block) - first_group_) * layout::kBlockRows;
  }
  CX_INLINE F row_vector(const float* values, int64_t block, int position) const {
    const float* row = values + group_offset(block) + position;
    if constexpr (kGroups == Groups::kWhole) return Isa::set1(*row);
    return Isa::repeat4(row[0], row[step_offset_[1]], row[step_offset_[2]], row[step_offset_[3]]);
  }
  float flat_scale(int64_t group) const {
    if (size_of(weight_.scale_type) == 1 && weight_.scale_type != ScaleType::kNested) {
      return byte_values_[static_cast<const uint8_t*>(weight_.scales)[group]];
    }
    return decode_scale(weight_, group, group);
  }
  void decode_floats(const void* source, int64_t index, float* out) const {
    for (int i = 0; i < layout::kBlockRows; i += kVector) {
      const uint16_t* halves = static_cast<const uint16_t*>(source) + index + i;
      Isa::store(out + i, weight_.scale_type == ScaleType::kFp32
                              ? Isa::load(static_cast<const float*>(source) + index + i)
                          : weight_.scale_type == ScaleType::kFp16 ? Isa::load_fp16(halves)
                                                                   : Isa::load_bf16(halves));
    }
  }
  void decode_bytes(int64_t index, int64_t group, float* out) {
    const bool nested = weight_.scale_type == ScaleType::kNested;
    if (nested && group >= nested_end_) start_nested(group);
    const uint8_t* bytes = static_cast<const uint8_t*>(weight_.scales) + index;
    // One by one: gather instructions are slower than this where microcode guards them (Cascade Lake, 65 cycles for
    // 16).
    for (int i = 0; i < layout::kBlockRows; ++i) out[i] = byte_values_[bytes[i]];
    if (!nested) return;
    for (int i = 0; i < layout::kBlockRows; i += kVector) {
      const F product = Isa::rounded(Isa::mul(Isa::load(out + i), Isa::load(nested_absmax_ + i)));
      Isa::store(out + i, Isa::add(product, Isa::load(nested_offset_ + i)));
    }
  }
  // Second-level absmax of every row from `group` on, and the group where the first of them changes.
  void start_nested(int64_t group) {
    const Weight& w = weight_;
    const int64_t groups = layout::ceil_div(w.k, w.group_size);
    nested_end_ = groups;
    for (int position = 0; position < layout::kBlockRows; ++position) {
      const int64_t n = slab_ * layout::kBlockRows + layout::scale_row(position);
      const int64_t flat = n * groups + group;
      const bool inside = n < w.n;
      nested_absmax_[position] = inside ? w.nested_absmax[flat / kNestedBlock] : 0.0f;
      nested_offset_[position] = inside ? nested_offset(w) : 0.0f;
      const int64_t end = group + kNestedBlock - flat % kNestedBlock;
      if (end < nested_end_) nested_end_ = end;
    }
  }

  const Weight& weight_;
  int64_t slab_ = 0;
  int64_t first_group_ = 0;
  int64_t nested_end_ = -1;
  int group_shift_;
  int step_offset_[layout::kSteps];
  const float* byte_values_ = nullptr;
  ByteScales byte_buffer_;
  float nested_absmax_[layout::kBlockRows];
  float nested_offset_[layout::kBlockRows];
  // Groups of 16 have four scales per block.
  alignas(64) float scales_[kRunBlocks * layout::kSteps * layout::kBlockRows];
  alignas(64) float zeros_[kZeros ? kRunBlocks * layout::kSteps * layout::kBlockRows : kVector];
};

}  // namespace cutlass_ext::cpu
