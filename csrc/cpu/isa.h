// Which of the kernels that are compiled for several instruction sets (isa_*.cpp) run here.
#pragma once

#include "lmfm_kernel.h"
#include "loss_kernel.h"
#include "match_kernel.h"

namespace bcmf::cpu {

struct Isa {
  const char* name;
  const LossIsaKernels& loss;
  const LmfmIsaKernels& lmfm;
  const MatchIsaKernels& match;
};

// torch's own choice, so that ATEN_CPU_CAPABILITY speaks for these kernels too.
const Isa& isa();

}  // namespace bcmf::cpu
