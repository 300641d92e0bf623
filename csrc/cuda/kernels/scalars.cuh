// Conversions between the dtype of a tensor and the dtype that its numbers are computed in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "common/args.h"
#include "cuda/shared_cutter.cuh"

namespace bcmf::device {

template <typename Scalar>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};

// Conversions are explicit, because torch's build switches the implicit ones off.
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ void narrow(float x, __half* to) { *to = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, float* to) { *to = x; }
__device__ __forceinline__ void narrow(double x, double* to) { *to = x; }

// Entries as words of memory hold them, of which a GPU converts two of 16 bits at once.
template <typename Scalar>
struct WordOf {
  static constexpr int kEntries = 1;
  static __device__ __forceinline__ void widen(unsigned word, float* to) { memcpy(to, &word, sizeof(word)); }
  static __device__ __forceinline__ float narrow(const float* from) { return *from; }
};
template <>
struct WordOf<__half> {
  static constexpr int kEntries = 2;
  static __device__ __forceinline__ void widen(unsigned word, float* to) {
    __half2 pair;
    memcpy(&pair, &word, sizeof(word));
    to[0] = device::widen(pair.x), to[1] = device::widen(pair.y);
  }
  static __device__ __forceinline__ __half2 narrow(const float* from) { return __floats2half2_rn(from[0], from[1]); }
};
template <>
struct WordOf<__nv_bfloat16> {
  static constexpr int kEntries = 2;
  static __device__ __forceinline__ void widen(unsigned word, float* to) {
    // A bfloat16 is the upper half of a float.
#if defined(__CUDA_ARCH__)
    asm("shl.b32 %0, %1, 16;" : "=f"(to[0]) : "r"(word));
    asm("and.b32 %0, %1, 0xffff0000;" : "=f"(to[1]) : "r"(word));
#else
    const unsigned halves[] = {word << 16, word & 0xffff0000u};
    memcpy(to, halves, sizeof(halves));
#endif
  }
  static __device__ __forceinline__ __nv_bfloat162 narrow(const float* from) {
    return __floats2bfloat162_rn(from[0], from[1]);
  }
};

}  // namespace bcmf::device
