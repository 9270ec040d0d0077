#include "bench.hpp"
using stream::Scales;
#define S(x) Scales::k##x
ADD(fp, false, 2, 1, 1, 4, false, S(Fp16)) ADD(fp, false, 2, 2, 2, 4, false, S(Fp16)) ADD(bf, false, 2, 1, 2, 4, true, S(Bf16)) ADD(bf, false, 3, 2, 4, 3, false, S(Fp32))
ADD(bf, false, 2, 2, 1, 4, false, S(Any), true) ADD(fp, false, 3, 1, 2, 3, true, S(Any), true) ADD(bf, true, 2, 1, 4, 4, false, S(Any)) ADD(fp, true, 2, 2, 2, 4, true, S(Fp16))
ADD(fp, true, 2, 1, 2, 4, false, S(Nested)) ADD(bf, false, 2, 2, 1, 3, false, S(Fp32)) ADD(bf, true, 2, 1, 1, 4, false, S(Any)) ADD(bf, false, 3, 1, 1, 3, false, S(Fp16))
