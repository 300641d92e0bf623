// The kernels of all ops for one instruction set. Each isa_<name>.cpp sets the target, defines BCMF_ISA, its name and
// BCMF_VECTOR_BYTES, and includes this file.
#include "cpu/isa.h"
#include "cpu/lmfm/lmfm_kernel.inl"
#include "cpu/loss_kernel.inl"
#include "cpu/match_kernel.inl"
#include "cpu/srm_kernel.inl"

const bcmf::cpu::Isa bcmf::cpu::BCMF_ISA::isa = {BCMF_ISA_NAME,
                                                 {kernels<float>, kernels<double>},
                                                 {lmfm::kernels<float>, lmfm::kernels<double>},
                                                 match::kernels,
                                                 {srm::kernels<float>, srm::kernels<double>}};
