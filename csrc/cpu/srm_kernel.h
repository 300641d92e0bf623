// The CPU kernels of bcmf::srm, compiled once per instruction set and chosen at run time.
#pragma once

#include "common/srm.h"
#include "cpu/axis.h"

namespace bcmf::cpu {

// What the steps of a call share. Each row of the batch has `W` of every entry, one kind after the other.
template <typename Acc>
struct SrmWork {
  AxisTable<Acc> down, across;  // of the rows and columns of the upsampled map
  // Backward only:
  Acc* positions;  // (N * H, 2, W): x and y
  Acc* pulls;      // (N * H, 2, W): derivatives of the total by x and y
  Acc* weights;    // (N * H, kNeighbours, W): of the neighbours' offsets
  Acc* sums;       // (N, C, h, w) in channels_last: the gradient of `low`, before it is narrowed
};

template <typename Acc>
struct SrmKernels {
  // These work on the rows begin..end of the N * H. find_pulls also writes the gradients of the logits in `raw`;
  // gather_offsets, after it, those of the offsets; its scratch has room for kOffsets * (W + 2) values.
  void (*forward)(const SrmArgs&, const SrmWork<Acc>&, int64_t begin, int64_t end);
  void (*find_pulls)(const SrmArgs&, const SrmWork<Acc>&, int64_t begin, int64_t end);
  void (*gather_offsets)(const SrmArgs&, const SrmWork<Acc>&, int64_t begin, int64_t end, Acc* scratch);
  // Adds up the gradient of the channels begin..end of an image of `low`, pixel by pixel, after find_pulls.
  void (*add_low)(const SrmArgs&, const SrmWork<Acc>&, int64_t n, int64_t begin, int64_t end);
};

struct SrmIsaKernels {
  SrmKernels<float> f32;
  SrmKernels<double> f64;
};

}  // namespace bcmf::cpu
