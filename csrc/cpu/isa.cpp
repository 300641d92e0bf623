#include "isa.h"

#include <ATen/Version.h>

#include <string>

namespace bcmf::cpu {

const Isa& isa() {
#if defined(__x86_64__)
  static const std::string capability = at::get_cpu_capability();
  static const Isa avx512 = {"AVX512", loss_kernels_avx512, lmfm_kernels_avx512, match_kernels_avx512};
  static const Isa avx2 = {"AVX2", loss_kernels_avx2, lmfm_kernels_avx2, match_kernels_avx2};
  if (capability == "AVX512") return avx512;
  if (capability == "AVX2") return avx2;
#endif
  static const Isa baseline = {"baseline", loss_kernels_baseline, lmfm_kernels_baseline, match_kernels_baseline};
  return baseline;
}

}  // namespace bcmf::cpu
