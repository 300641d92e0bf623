// The CPU kernels of the context modules' ops, compiled once per instruction set and chosen at run time.
#pragma once

#include "common/lmfm.h"

namespace bcmf::cpu {

// A unit is as many channels of a branch as a vector has lanes. A task consists of some units of all images, or of one
// image in eval mode. One thread works on it from the statistics to the last store, so that a channel has the same bits
// however channels are divided into tasks.
template <typename Acc>
struct LmfmKernels {
  int64_t lanes;
  // Works on the tasks begin..end, each of `units` units; `scratch` holds units * lanes * *_scratch(args, backward) acc
  // values.
  using Kernel = void (*)(const NormReluArgs&, int64_t units, int64_t begin, int64_t end, Acc* scratch);
  Kernel pool_forward, pool_backward, add_forward, add_backward;
};

struct LmfmIsaKernels {
  LmfmKernels<float> f32;
  LmfmKernels<double> f64;
};

inline int64_t images_at_once(const NormReluArgs& args, bool backward) {
  return args.training || backward ? args.N : 1;
}

// The scratch values for each lane: the sums of a task's images, their gradients, and of one image the smaller map and
// the same resampled along x.
inline int64_t add_scratch(const NormReluArgs& args, bool backward) {
  int64_t most = 0;
  for (int b = 0; b < args.branches; ++b) {
    const Branch& branch = args.branch[b];
    const int64_t sums = images_at_once(args, backward) * branch.H * branch.W * (backward ? 2 : 1);
    const int64_t size = sums + branch.h * (branch.w + branch.W);
    most = size > most ? size : most;
  }
  return most;
}

// The scratch values for each lane: the pooled maps of a task's images, their gradients, one image, and a row of it
// pooled along y.
inline int64_t pool_scratch(const NormReluArgs& args, bool backward) {
  int64_t pooled = 0;
  for (int p = 0; p < kPools; ++p) pooled += args.branch[p].H * args.branch[p].W;
  const Branch& first = args.branch[0];
  return images_at_once(args, backward) * pooled * (backward ? 2 : 1) + (first.h + 1) * first.w;
}

}  // namespace bcmf::cpu
