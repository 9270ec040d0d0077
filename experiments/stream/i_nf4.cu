#include "bench.hpp"
#define F32 Scales::kFp32
using stream::Scales;
#define XR Scales::kFp32, false, true
#ifdef P1
ADD(bf, true, 1, 1, 1, 8, false, F32) ADD(bf, true, 2, 1, 1, 4, true, F32) ADD(bf, true, 3, 1, 1, 3, true, F32) ADD(bf, true, 4, 1, 1, 2, true, F32) ADD(bf, true, 4, 1, 1, 3, true, F32)
#elif defined(P2)
ADD(bf, true, 2, 1, 1, 4, false, XR) ADD(bf, true, 4, 1, 1, 2, false, XR) ADD(bf, true, 3, 1, 1, 3, false, XR) ADD(bf, true, 2, 2, 1, 3, false, XR) ADD(bf, true, 3, 2, 1, 2, false, XR) ADD(bf, true, 4, 2, 1, 2, false, XR) ADD(bf, true, 4, 2, 1, 1, true, F32) ADD(bf, true, 1, 2, 1, 4, false, XR)
#else
ADD(bf, true, 1, 1, 1, 8, false, Scales::kNested) ADD(bf, true, 2, 1, 1, 4, true, Scales::kNested) ADD(bf, true, 3, 1, 1, 3, true, Scales::kNested) ADD(bf, true, 4, 1, 1, 2, true, Scales::kNested)
ADD(bf, true, 2, 2, 1, 2, false, Scales::kNested, false, true) ADD(bf, true, 4, 2, 1, 2, false, Scales::kNested, false, true) ADD(bf, true, 3, 2, 1, 2, false, Scales::kNested, false, true) 
#endif
