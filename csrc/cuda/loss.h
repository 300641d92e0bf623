#pragma once

#include "../device/common.cuh"

struct CUstream_st;

namespace bcmf::cuda {

using Stream = CUstream_st*;  // cudaStream_t

// Bytes of scratch that the forward needs on the device, aligned to 8.
int64_t loss_scratch_bytes(const LossArgs& args);

// All launches go to `stream`, nothing synchronises. They return cudaGetLastError().
int loss_forward(const LossArgs& args, void* scratch, Stream stream);
int loss_backward(const LossArgs& args, Stream stream);

}  // namespace bcmf::cuda
