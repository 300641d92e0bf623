#pragma once

#include "../device/common.cuh"

namespace bcmf::cpu {

// Both run on torch's threads. The forward fills stats, total, summary (and nll) and returns the number of bad labels.
int64_t loss_forward(const LossArgs& args);
void loss_backward(const LossArgs& args);

// Of `args` the sizes and the logits count, and with bins the labels. classes: (N, H, W) uint8, or int32 of more than
// 256. bins: null, or counts of label * C + class; then of bad labels, and of ignored pixels.
void upsample_argmax(const LossArgs& args, void* classes, int64_t* bins);

}  // namespace bcmf::cpu
