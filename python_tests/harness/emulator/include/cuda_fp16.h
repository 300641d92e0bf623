#pragma once
#include <c10/util/Half.h>  // header-only; rounds to nearest even as CUDA's does

using __half = c10::Half;
inline float __half2float(__half x) { return x; }
inline __half __float2half_rn(float x) { return x; }
struct __half2 {
  __half x, y;
};
inline __half2 __floats2half2_rn(float a, float b) { return {a, b}; }
