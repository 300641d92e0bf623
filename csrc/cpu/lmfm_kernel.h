// The CPU kernels of the context modules' ops, compiled once per instruction set and chosen at run time.
#pragma once

#include "../device/lmfm_args.cuh"

namespace bcmf::cpu {

// A unit is as many channels of a branch as a vector has lanes. A task is some units of all images, in eval mode of one
// image: a thread works on it from statistics to the last store, and a channel has the same bits whatever the tasks
// are.
template <typename Acc>
struct LmfmKernels {
  int64_t lanes;
  // Tasks begin..end, of so many units each; `scratch` holds units * lanes * *_scratch(args, backward) acc values.
  using Kernel = void (*)(const NormReluArgs&, int64_t units, int64_t begin, int64_t end, Acc* scratch);
  Kernel pool_forward, pool_backward, add_forward, add_backward;
};

struct LmfmIsaKernels {
  LmfmKernels<float> f32;
  LmfmKernels<double> f64;
};
extern const LmfmIsaKernels lmfm_kernels_baseline, lmfm_kernels_avx2, lmfm_kernels_avx512;

inline int64_t images_at_once(const NormReluArgs& args, bool backward) {
  return args.training || backward ? args.N : 1;
}

// Values of a lane: all images' sums, their gradients, and one image's smaller map, and that resampled along an axis.
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

// All images' pooled maps, their gradients, one image, and a row of it pooled along y.
inline int64_t pool_scratch(const NormReluArgs& args, bool backward) {
  int64_t pooled = 0;
  for (int p = 0; p < kPools; ++p) pooled += args.branch[p].H * args.branch[p].W;
  const Branch& first = args.branch[0];
  return images_at_once(args, backward) * pooled * (backward ? 2 : 1) + (first.h + 1) * first.w;
}

}  // namespace bcmf::cpu
