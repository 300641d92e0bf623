// These kernels take what the compiler targets by default: SSE2 on x86-64, NEON on 64-bit ARM.
#define BCMF_ISA baseline
#define BCMF_ISA_NAME "baseline"
#define BCMF_VECTOR_BYTES 16
#include "cpu/isa_kernels.inl"
