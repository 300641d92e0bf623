#pragma once

#include "../device/common.cuh"
#include "stream.h"

namespace bcmf::cuda {

// Bytes of scratch that each needs on the device, aligned to 16.
int64_t loss_forward_scratch(const LossArgs& args);
int64_t loss_backward_scratch(const LossArgs& args);

// All launches go to `stream`, nothing synchronises. They return cudaGetLastError().
int loss_forward(const LossArgs& args, void* scratch, Stream stream);
int loss_backward(const LossArgs& args, void* scratch, Stream stream);

// bcmf::upsample_argmax: of `args` the sizes and the logits count. classes: (N, H, W) uint8, or int32 of more than 256.
int upsample_argmax(const LossArgs& args, void* classes, Stream stream);

}  // namespace bcmf::cuda
