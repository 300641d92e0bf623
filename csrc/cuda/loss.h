#pragma once

#include "../device/common.cuh"

struct CUstream_st;

namespace bcmf::cuda {

using Stream = CUstream_st*;  // cudaStream_t

// Doubles of scratch that the forward needs on the device.
int64_t loss_scratch_size(const LossArgs& args);

// All launches go to `stream`, nothing synchronises. They return cudaGetLastError().
int loss_forward(const LossArgs& args, double* scratch, Stream stream);
int loss_backward(const LossArgs& args, Stream stream);

}  // namespace bcmf::cuda
