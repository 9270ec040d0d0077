// cx_pack and cx_unpack: checks and the choice of code width.
#pragma once

#include "cutlass_ext/cutlass_ext.h"

namespace cutlass_ext {

// Converts `from`, whose layout must be `from_layout`, into `to`, which must have the other one.
cx_status convert_layout(const char* function, const cx_weight* from, cx_layout from_layout, cx_weight* to,
                         cx_device device, void* stream);

}  // namespace cutlass_ext
