#pragma once

#include "../device/common.cuh"
#include "stream.h"

namespace bcmf::cuda {

// The bytes of scratch memory that each needs on the device, aligned to 16.
int64_t loss_forward_scratch(const LossArgs& args);
int64_t loss_backward_scratch(const LossArgs& args);

// All kernels are launched on `stream`, and nothing synchronises. Both return cudaGetLastError().
int loss_forward(const LossArgs& args, void* scratch, Stream stream);
int loss_backward(const LossArgs& args, void* scratch, Stream stream);

// bcmf::upsample_argmax, which reads the sizes and the logits of `args` and nothing else. classes: (N, H, W) uint8, or
// int32 if there are more than 256.
int upsample_argmax(const LossArgs& args, void* classes, Stream stream);

}  // namespace bcmf::cuda
