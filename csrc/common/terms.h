// From the sums over a batch to the terms, the total and the scales of the gradient; and small functions that the
// kernels of all terms need.
#pragma once

#include <cmath>

#include "common/geometry.h"

namespace bcmf {

constexpr int kMaxRadius = 3;  // of CPG's windows

// Returns the larger of two scores; NaN is larger than all.
template <typename Acc>
BCMF_HOST_DEVICE Acc larger(Acc a, Acc b) {
  return b > a || b != b ? b : a;
}

// Returns the derivative of the total by the loss of a pixel that one of BCL's steps selected, which takes the mean
// over `count` pixels.
template <typename Acc>
BCMF_HOST_DEVICE Acc bcl_scale(const LossArgs& args, Acc count) {
  const Acc upstream = *static_cast<const Acc*>(args.grad_total);
  return count != 0 ? upstream * static_cast<Acc>(args.bcl_weight) / static_cast<Acc>(args.bcl_steps) / count : Acc(0);
}

// A mean over no pixel is 0.
BCMF_HOST_DEVICE double ratio(double sum, double count) { return count != 0 ? sum / count : 0; }

// The step loss_finish: finds terms, total and summary from sums and cutoff. A bad label makes all terms NaN.
template <typename Acc>
BCMF_HOST_DEVICE void finish_loss(const LossArgs& args) {
  const double* sums = args.sums;
  const double valid = sums[kValidPixels], bad = sums[kBadLabels] > 0 ? static_cast<double>(NAN) : 0;
  Acc* summary = static_cast<Acc*>(args.summary);
  for (int entry = 0; entry < kSummarySize; ++entry) summary[entry] = 0;
  summary[kValid] = static_cast<Acc>(valid);
  double terms[kTerms] = {};
  if (args.ce) {
    summary[kDenominator] = static_cast<Acc>(sums[kCeCount]);
    summary[kCutoff] = args.ohem && valid > 0 ? *static_cast<const Acc*>(args.cutoff) : Acc(0);
    terms[kCe] = ratio(sums[kCeSum], sums[kCeCount]) + bad;
  }
  for (int s = 0; s < args.bcl_steps; ++s) {
    const double* of_step = sums + kBclSums + 2 * s;
    summary[kSelected + s] = static_cast<Acc>(of_step[1]);
    terms[kBcl] += ratio(of_step[0], args.bcl_flipped ? valid : of_step[1]) / args.bcl_steps + bad;
  }
  if (args.cpg_radius > 0) {
    summary[kEdges] = static_cast<Acc>(sums[kCpgCount]);
    terms[kCpg] = ratio(sums[kCpgSum], sums[kCpgCount]) + bad;
  }
  for (int term = 0; term < kTerms; ++term) static_cast<Acc*>(args.terms)[term] = static_cast<Acc>(terms[term]);
  double total = terms[kCe];
  if (args.bcl_steps > 0) total += args.bcl_weight * terms[kBcl];
  if (args.cpg_radius > 0) total += args.cpg_weight * terms[kCpg];
  *static_cast<Acc*>(args.total) = static_cast<Acc>(total);
}

}  // namespace bcmf
