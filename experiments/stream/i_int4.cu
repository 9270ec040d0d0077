#include "bench.hpp"
using stream::Scales;
#define XR Scales::kBf16, false, true
#ifdef P1
ADD(bf, false, 2, 1, 1, 4, false, XR) ADD(bf, false, 3, 1, 1, 3, false, XR) ADD(bf, false, 4, 1, 1, 2, false, XR) ADD(bf, false, 4, 1, 1, 3, false, XR) ADD(bf, false, 1, 2, 1, 4, false, XR)
ADD(bf, false, 2, 2, 1, 3, false, XR) ADD(bf, false, 3, 2, 1, 2, false, XR) ADD(bf, false, 4, 2, 1, 2, false, XR)  ADD(bf, false, 4, 2, 1, 3, false, XR) 
#elif defined(P2)
ADD(bf, false, 1, 1, 1, 8, true) ADD(bf, false, 2, 1, 1, 4, true) ADD(bf, false, 3, 1, 1, 3, true) ADD(bf, false, 4, 1, 1, 2, true) ADD(bf, false, 4, 1, 1, 3, true)
#else
ADD(bf, false, 1, 1, 1, 8, false) ADD(bf, false, 1, 1, 1, 4, false) ADD(bf, false, 4, 2, 1, 1, true) ADD(bf, false, 2, 1, 1, 4, false) ADD(bf, false, 3, 1, 1, 3, false) ADD(bf, false, 2, 2, 1, 4, false) ADD(bf, false, 4, 2, 1, 2, true) ADD(bf, false, 4, 2, 1, 2, false)
#endif
