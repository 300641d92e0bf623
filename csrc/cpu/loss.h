#pragma once

#include "../device/common.cuh"

namespace bcmf::cpu {

// Both run on torch's threads and take at least one label pixel. The forward fills stats, total, summary (and nll) and
// returns the number of bad labels.
int64_t loss_forward(const LossArgs& args);
void loss_backward(const LossArgs& args);

// Reads the sizes and the logits of `args`, and with bins the labels; there is at least one label pixel. classes:
// (N, H, W) uint8, or int32 if there are more than 256. bins: null, or zeros, to which it adds the counts of
// label * C + class, then of bad labels, then of ignored pixels.
void upsample_argmax(const LossArgs& args, void* classes, int64_t* bins);

}  // namespace bcmf::cpu
