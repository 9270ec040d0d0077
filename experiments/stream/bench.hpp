#pragma once
#include <vector>
#include <string>
#include "stream.cuh"
using namespace cutlass_ext;
using stream::Params; using stream::Plan;
struct Entry {
  bool codebook; int dtype;  // 0 bf16, 1 fp16
  int R, MT, G, S; bool bulk; int scales; bool zeros, xring;
  const void* fn;
  Plan (*plan)(Params&, int, int, int, int, int);
};
std::vector<Entry>& registry();
template <class C> struct Reg {
  Reg() {
    registry().push_back(Entry{C::kCodebook, std::is_same_v<typename C::T, __half> ? 1 : 0, C::kAtoms, C::kTokens8, C::kGroups, C::kStages, C::kBulk,
                               int(C::kScales), C::kZeros, C::kXRing, (const void*)&stream::kernel<C>, &stream::make_plan<C>});
  }
};
#define CAT2(a, b) a##b
#define CAT(a, b) CAT2(a, b)
#define ADD(...) static Reg<stream::Config<__VA_ARGS__>> CAT(reg_, __COUNTER__);
using bf = __nv_bfloat16;
using fp = __half;
