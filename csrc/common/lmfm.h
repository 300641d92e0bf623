// Declarations that host and device code of the context modules (LMFM, DAPPM) have in common: arguments, and where
// pools lie.
//
// A branch is relu(norm(·)) of one map, or of the sum of two: bcmf::pool_norm_relu has four branches, pools of one map;
// in bcmf::add_norm_relu the first summand is resampled bilinearly, either may be missing.
#pragma once

#include "common/args.h"

namespace bcmf {

constexpr int kMaxBranches = 8;
constexpr int kPools = 4;

struct Branch {
  int64_t C, h, w, H, W;               // channels; sizes of the map that is pooled or resampled, and of the output
  int64_t first;                       // its first channel among those of all branches
  MapView resampled, added;            // the summands; data is null where there is none
  MapView out;                         // the output; in the backward its gradient, which is read
  MapView grad_resampled, grad_added;  // backward only; pools write only the first branch's grad_resampled
  const void *weight, *bias;           // (C,) acc
  void *mean, *variance;  // (C,) acc, forward only: running statistics, read in eval mode, moved in training
};

// `acc` is float, or double for fp64 maps, which are all of one dtype.
struct NormReluArgs {
  int64_t N, channels;  // of all branches
  int branches;
  bool training;  // statistics are those of the batch
  double momentum, eps;
  FloatType type;
  void* stats;       // (2, channels) acc: mean, 1/sqrt(variance + eps); the backward reads them
  void* grad_norms;  // (2, channels) acc, backward only: the gradients of weight and bias
  Branch branch[kMaxBranches];
};

// A pool along an axis, whose windows are cut off at the border.
struct PoolAxis {
  int64_t size, stride, pad, in;

  // The window of output o holds the entries first(o) to end(o) - 1.
  BCMF_HOST_DEVICE int64_t first(int64_t o) const { return o * stride > pad ? o * stride - pad : 0; }
  BCMF_HOST_DEVICE int64_t end(int64_t o) const { return o * stride - pad + size < in ? o * stride - pad + size : in; }
  // The windows of outputs first_with(i) to end_with(i) - 1 hold entry i.
  BCMF_HOST_DEVICE int64_t first_with(int64_t i) const { return i + pad < size ? 0 : (i + pad - size) / stride + 1; }
  BCMF_HOST_DEVICE int64_t end_with(int64_t i) const {
    return (i + pad) / stride + 1 < out() ? (i + pad) / stride + 1 : out();
  }
  BCMF_HOST_DEVICE int64_t out() const { return (in - 1 + 2 * pad - (size - 1)) / stride + 1; }
};

// The average pools 0, 1 and 2 have windows of 5, 9 and 17 entries, centred on every 2nd, 4th and 8th entry; the last
// one takes the whole map. Padding counts as entries of 0, so that each output is a sum over `size` entries divided by
// `size`.
BCMF_HOST_DEVICE PoolAxis pool_axis(int pool, int64_t in) {
  if (pool == kPools - 1) return {in, 1, 0, in};
  const int64_t stride = int64_t{2} << pool;
  return {2 * stride + 1, stride, stride, in};
}

}  // namespace bcmf
