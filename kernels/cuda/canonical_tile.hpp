// Tiles of canonical codes in shared memory: 64 rows x 256 k, loaded and stored with the widest access that the rows'
// alignment allows.
#pragma once

#include <cstdint>

#include "kernels/layout.hpp"

namespace cutlass_ext::cuda {

// Blocks of a tile along k: 128 bytes of a row at 4 bits, a whole cache line of every row.
constexpr int kTileBlocks = 4;
constexpr int kTileK = kTileBlocks * layout::kBlockK;
constexpr int kTileThreads = 256;

static constexpr int64_t tiles_along_k(int64_t k) { return layout::ceil_div(k, kTileK); }
static constexpr int64_t tile_count(int64_t n, int64_t k) { return layout::slabs(n) * tiles_along_k(k); }

// The canonical codes of a weight as rows of bytes.
struct CodeRows {
  int64_t n;
  int64_t bytes;  // of a row
  static constexpr CodeRows of(int64_t n, int64_t k, int bits) { return {n, layout::ceil_div(k * bits, 8)}; }
};

template <int kBits>
struct CanonicalTile {
  static constexpr int kRowBytes = kTileK * kBits / 8;
  // An odd multiple of 16 bytes: eight consecutive rows lie in different banks. What lies behind a row may be read.
  static constexpr int kPitch = kRowBytes + 16;
  static constexpr int kBytes = layout::kBlockRows * kPitch;
  static_assert(kPitch / 16 % 2 == 1 && kPitch % 16 == 0);

  // Bytes beyond N and beyond the end of a row become 0. All threads of the block take part; no barrier.
  template <class Access>
  static __device__ void load(uint8_t* tile, const uint8_t* codes, CodeRows rows, int64_t slab, int64_t tile_k) {
    visit<Access>(rows, slab, tile_k, [&](int at, int64_t offset, bool inside) {
      *reinterpret_cast<Access*>(tile + at) = inside ? *reinterpret_cast<const Access*>(codes + offset) : Access{};
    });
  }

  // The eight bytes of each row that follow a loaded tile, where the row goes on.
  static __device__ void load_beyond(uint8_t* tile, const uint8_t* codes, CodeRows rows, int64_t slab, int64_t tile_k) {
    constexpr int kCount = layout::kBlockRows * 8;
    for (int i = threadIdx.x; i < kCount; i += kTileThreads) {
      const int row = i / 8, byte = kRowBytes + i % 8;
      const int64_t n = slab * layout::kBlockRows + row, in_row = tile_k * kRowBytes + byte;
      if (n < rows.n && in_row < rows.bytes) tile[row * kPitch + byte] = codes[n * rows.bytes + in_row];
    }
  }

  template <class Access>
  static __device__ void store(const uint8_t* tile, uint8_t* codes, CodeRows rows, int64_t slab, int64_t tile_k) {
    visit<Access>(rows, slab, tile_k, [&](int at, int64_t offset, bool inside) {
      if (inside) *reinterpret_cast<Access*>(codes + offset) = *reinterpret_cast<const Access*>(tile + at);
    });
  }

 private:
  // visit(offset in the tile, offset in the codes, whether that is inside of the codes)
  template <class Access, class Visit>
  static __device__ void visit(CodeRows rows, int64_t slab, int64_t tile_k, const Visit& body) {
    constexpr int kSize = static_cast<int>(sizeof(Access));
    constexpr int kPerRow = kRowBytes / kSize;
    static_assert(kRowBytes % kSize == 0);
    constexpr int kCount = layout::kBlockRows * kPerRow;
    // All loads of a thread before its first store.
#pragma unroll(kSize == 16 ? (kCount + kTileThreads - 1) / kTileThreads : 4)
    for (int first = 0; first < kCount; first += kTileThreads) {
      const int i = first + static_cast<int>(threadIdx.x);
      if (kCount % kTileThreads != 0 && i >= kCount) break;
      const int row = i / kPerRow, byte = i % kPerRow * kSize;
      const int64_t n = slab * layout::kBlockRows + row;
      const int64_t in_row = tile_k * kRowBytes + byte;
      body(row * kPitch + byte, n * rows.bytes + in_row, n < rows.n && in_row < rows.bytes);
    }
  }
};

// body(value of an unsigned type): the widest access that suits rows at `codes`.
template <class Body>
void with_access(const void* codes, int64_t row_bytes, const Body& body) {
  const int64_t alignment = reinterpret_cast<int64_t>(codes) | row_bytes;
  if (alignment % 16 == 0) return body(uint4{});
  if (alignment % 4 == 0) return body(uint32_t{});
  body(uint8_t{});
}

}  // namespace cutlass_ext::cuda
