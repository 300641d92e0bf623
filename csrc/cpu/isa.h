// The kernels are compiled for several instruction sets (isa_*.cpp); isa() chooses those that run on this CPU.
#pragma once

#include "cpu/lmfm/lmfm_kernel.h"
#include "cpu/loss_kernel.h"
#include "cpu/match_kernel.h"
#include "cpu/srm_kernel.h"

namespace bcmf::cpu {

struct Isa {
  const char* name;
  LossIsaKernels loss;
  LmfmIsaKernels lmfm;
  MatchIsaKernels match;
  SrmIsaKernels srm;
};
namespace baseline {
extern const Isa isa;
}
namespace avx2 {
extern const Isa isa;
}
namespace avx512 {
extern const Isa isa;
}

// Makes the same choice as torch, so that ATEN_CPU_CAPABILITY holds for these kernels, too.
const Isa& isa();

}  // namespace bcmf::cpu
