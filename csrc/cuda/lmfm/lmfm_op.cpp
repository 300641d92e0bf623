// bcmf::pool_norm_relu and bcmf::add_norm_relu on CUDA.

#include "cuda/device.h"
#include "cuda/library.h"
#include "cuda/lmfm/lmfm.h"
#include "lmfm_tensors.h"

namespace bcmf {
namespace {

template <int (*kernel)(const NormReluArgs&, void*, cuda::Stream), int64_t (*scratch_bytes)(const NormReluArgs&, bool),
          bool backward>
void run(const NormReluArgs& args, const Tensor& like) {
  if (args.N == 0) return;
  const cuda::Guard guard(like);
  const Tensor scratch = cuda::make_scratch(like, scratch_bytes(args, backward));
  cuda::check_launch(kernel(args, scratch.data_ptr(), cuda::current_stream(like)));
}

}  // namespace

BCMF_CUDA_LIBRARY(m) {
  register_lmfm<run<cuda::pool_forward, cuda::pool_scratch, false>, run<cuda::pool_backward, cuda::pool_scratch, true>,
                run<cuda::add_forward, cuda::add_scratch, false>, run<cuda::add_backward, cuda::add_scratch, true>>(m);
}

}  // namespace bcmf
