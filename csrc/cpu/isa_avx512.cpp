#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma,prefer-vector-width=512")
#endif

#define BCMF_ISA avx512
#define BCMF_ISA_NAME "AVX512"
#define BCMF_VECTOR_BYTES 64
#include "cpu/isa_kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
