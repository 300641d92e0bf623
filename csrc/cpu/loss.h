#pragma once

#include "common/args.h"

namespace bcmf::cpu {

// These run on torch's threads and take at least one label pixel. loss_sums fills sums, cutoff, stats and selected (and
// nll). If there are bad labels, it counts them and nothing else.
void loss_sums(const LossArgs& args);
void loss_backward(const LossArgs& args);

// Fills total, terms and summary. acc: their dtype, and that of cutoff.
void loss_finish(const LossArgs& args, FloatType acc);

// Reads the sizes and the logits of `args`, and with bins the labels; there is at least one label pixel. classes:
// (N, H, W) uint8, or int32 if there are more than 256. bins: null, or zeros, to which it adds the counts of
// label * C + class, then of bad labels, then of ignored pixels.
void upsample_argmax(const LossArgs& args, void* classes, int64_t* bins);

}  // namespace bcmf::cpu
