#pragma once

#include "common/lmfm.h"
#include "cuda/stream.h"

namespace bcmf::cuda {

// bcmf::pool_norm_relu and bcmf::add_norm_relu: each function launches one kernel on `stream` and returns
// cudaGetLastError(). The forward fills out and stats, the backward the gradients of maps and grad_norms. scratch:
// device memory of as many bytes as *_scratch returns.
int pool_forward(const NormReluArgs& args, void* scratch, Stream stream);
int pool_backward(const NormReluArgs& args, void* scratch, Stream stream);
int add_forward(const NormReluArgs& args, void* scratch, Stream stream);
int add_backward(const NormReluArgs& args, void* scratch, Stream stream);
int64_t pool_scratch(const NormReluArgs& args, bool backward);
int64_t add_scratch(const NormReluArgs& args, bool backward);

}  // namespace bcmf::cuda
