#pragma once

#include "common/args.h"
#include "cuda/stream.h"

namespace bcmf::cuda {

// How many maps LossArgs::stats has, and the bytes of LossArgs::marks.
int64_t loss_stats_maps(const LossArgs& args);
int64_t loss_mark_bytes(const LossArgs& args);

// The bytes of scratch memory that each needs on the device, aligned to 16.
int64_t loss_sums_scratch(const LossArgs& args);
int64_t loss_backward_scratch(const LossArgs& args);

// All kernels are launched on `stream`, and nothing synchronises. These functions return cudaGetLastError(). acc: the
// dtype of cutoff, total, terms and summary.
int loss_sums(const LossArgs& args, void* scratch, Stream stream);
int loss_finish(const LossArgs& args, FloatType acc, Stream stream);
int loss_backward(const LossArgs& args, void* scratch, Stream stream);

// Tells whether a block of the current device has the shared memory that loss_backward takes. In fp64 that of CPG is
// too much for some.
bool loss_backward_fits(const LossArgs& args);

// bcmf::upsample_argmax, which reads the sizes and the logits of `args` and nothing else. classes: (N, H, W) uint8, or
// int32 if there are more than 256.
int upsample_argmax(const LossArgs& args, void* classes, Stream stream);

}  // namespace bcmf::cuda
