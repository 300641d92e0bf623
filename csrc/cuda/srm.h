#pragma once

#include "common/srm.h"
#include "cuda/stream.h"

namespace bcmf::cuda {

// bcmf::srm: both launch kernels on `stream` and return cudaGetLastError(). scratch: device memory of srm_scratch
// bytes.
int srm_forward(const SrmArgs& args, Stream stream);
int srm_backward(const SrmArgs& args, void* scratch, Stream stream);
int64_t srm_scratch(const SrmArgs& args);

}  // namespace bcmf::cuda
