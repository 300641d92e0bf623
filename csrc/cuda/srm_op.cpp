// bcmf::srm on CUDA.

#include "cuda/device.h"
#include "cuda/library.h"
#include "cuda/srm.h"
#include "srm_tensors.h"

namespace bcmf {
namespace {

void forward(const SrmArgs& args, const Tensor& like) {
  const cuda::Guard guard(like);
  cuda::check_launch(cuda::srm_forward(args, cuda::current_stream(like)));
}

void backward(const SrmArgs& args, const Tensor& like) {
  const cuda::Guard guard(like);
  const Tensor scratch = cuda::make_scratch(like, cuda::srm_scratch(args));
  cuda::check_launch(cuda::srm_backward(args, scratch.data_ptr(), cuda::current_stream(like)));
}

}  // namespace

BCMF_CUDA_LIBRARY(m) { register_srm<forward, backward>(m); }

}  // namespace bcmf
