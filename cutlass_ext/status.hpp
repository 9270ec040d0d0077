// How a C API function fails: a status, and a message for the calling thread.
#pragma once

#include <cstdarg>
#include <cstdio>

#include "cutlass_ext/cutlass_ext.h"

namespace cutlass_ext {

inline char* last_error() {
  thread_local char message[1024] = "";
  return message;
}

constexpr size_t kMessageBytes = 1024;

// Stores "function: " and the formatted text; returns the status.
[[gnu::format(printf, 3, 4)]] inline cx_status fail(cx_status status, const char* function, const char* format, ...) {
  char* message = last_error();
  const int used = std::snprintf(message, kMessageBytes, "%s: ", function);
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message + used, kMessageBytes - static_cast<size_t>(used), format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace cutlass_ext

// Returns from the enclosing function when a call did not succeed.
#define CX_TRY(call)                      \
  do {                                    \
    const cx_status status_ = (call);     \
    if (status_ != CX_OK) return status_; \
  } while (0)
