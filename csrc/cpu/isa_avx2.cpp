#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,prefer-vector-width=256")
#endif

#define BCMF_ISA avx2
#define BCMF_VECTOR_BYTES 32
#include "cpu/lmfm/lmfm_kernel.inl"
#include "cpu/loss_kernel.inl"
#include "cpu/match_kernel.inl"

const bcmf::cpu::LossIsaKernels bcmf::cpu::loss_kernels_avx2 = {avx2::kernels<float>, avx2::kernels<double>};
const bcmf::cpu::LmfmIsaKernels bcmf::cpu::lmfm_kernels_avx2 = {avx2::lmfm::kernels<float>,
                                                                avx2::lmfm::kernels<double>};
const bcmf::cpu::MatchIsaKernels bcmf::cpu::match_kernels_avx2 = avx2::match::kernels;

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
