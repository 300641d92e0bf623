#pragma once

#include "../device/common.cuh"

namespace bcmf::cpu {

// Instruction set of the kernels in use: "AVX512", "AVX2" or "baseline".
const char* loss_capability();

// Both run on torch's threads. The forward fills stats, total, summary (and nll) and returns the number of bad labels.
int64_t loss_forward(const LossArgs& args);
void loss_backward(const LossArgs& args);

}  // namespace bcmf::cpu
