#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,prefer-vector-width=256")
#endif

#define BCMF_ISA avx2
#define BCMF_ISA_NAME "AVX2"
#define BCMF_VECTOR_BYTES 32
#include "cpu/isa_kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
