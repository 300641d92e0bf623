// These kernels take what the compiler targets by default: SSE2 on x86-64, NEON on 64-bit ARM.
#define BCMF_ISA baseline
#define BCMF_VECTOR_BYTES 16
#include "cpu/lmfm/lmfm_kernel.inl"
#include "cpu/loss_kernel.inl"
#include "cpu/match_kernel.inl"

const bcmf::cpu::LossIsaKernels bcmf::cpu::loss_kernels_baseline = {baseline::kernels<float>,
                                                                    baseline::kernels<double>};
const bcmf::cpu::LmfmIsaKernels bcmf::cpu::lmfm_kernels_baseline = {baseline::lmfm::kernels<float>,
                                                                    baseline::lmfm::kernels<double>};
const bcmf::cpu::MatchIsaKernels bcmf::cpu::match_kernels_baseline = baseline::match::kernels;
