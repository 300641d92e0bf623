// bcmf::pool_norm_relu and bcmf::add_norm_relu on the CPU.

#include "cpu/lmfm/lmfm.h"
#include "lmfm_tensors.h"

namespace bcmf {
namespace {

template <void (*kernel)(const NormReluArgs&)>
void run(const NormReluArgs& args, const Tensor&) {
  if (args.N > 0) kernel(args);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bcmf, CPU, m) {
  register_lmfm<run<cpu::pool_forward>, run<cpu::pool_backward>, run<cpu::add_forward>, run<cpu::add_backward>>(m);
}

}  // namespace bcmf
