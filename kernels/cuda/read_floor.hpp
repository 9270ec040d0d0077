// The time that no kernel on a weight can beat: that of reading its bytes.
#pragma once
#include <cstddef>

namespace cutlass_ext::cuda {

// Reads `bytes` bytes at `data` (device memory, 16-byte aligned), but for a rest of less than 16, on `stream` (a
// cudaStream_t) and does nothing with them. `scratch`: 4 bytes of device memory, 4-byte aligned, that may be
// overwritten. One plain launch; no allocation, no synchronization. Returns nullptr, or what is wrong.
const char* read_floor(const void* data, size_t bytes, void* scratch, void* stream);

}  // namespace cutlass_ext::cuda
