#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma,prefer-vector-width=512")
#endif

#define BCMF_ISA avx512
#define BCMF_VECTOR_BYTES 64
#include "cpu/lmfm/lmfm_kernel.inl"
#include "cpu/loss_kernel.inl"
#include "cpu/match_kernel.inl"

const bcmf::cpu::LossIsaKernels bcmf::cpu::loss_kernels_avx512 = {avx512::kernels<float>, avx512::kernels<double>};
const bcmf::cpu::LmfmIsaKernels bcmf::cpu::lmfm_kernels_avx512 = {avx512::lmfm::kernels<float>,
                                                                  avx512::lmfm::kernels<double>};
const bcmf::cpu::MatchIsaKernels bcmf::cpu::match_kernels_avx512 = avx512::match::kernels;

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
