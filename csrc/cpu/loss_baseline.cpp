// Whatever the compiler targets by default: SSE2 on x86-64, NEON on 64-bit ARM.
#define BCMF_ISA baseline
#define BCMF_VECTOR_BYTES 16
#include "loss_kernel.inl"

const bcmf::cpu::IsaKernels bcmf::cpu::loss_kernels_baseline = {baseline::kernels<float>, baseline::kernels<double>};
