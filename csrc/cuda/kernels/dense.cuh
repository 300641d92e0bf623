// The steps that read all logits: dense_forward and dense_backward.
#pragma once

#include "common/select.h"
#include "cuda/kernels/bcl.cuh"
#include "cuda/kernels/finish.cuh"
#include "cuda/kernels/logits.cuh"

namespace bcmf::device {

// Finds m and the sum of exp(z - m) over the classes of a stack, reading the logits once: the sum is scaled down
// whenever m grows.
template <typename Source, typename Acc>
__device__ __forceinline__ void sum_exps(const Source& source, int C, Acc (&m)[kStack], Acc (&sum)[kStack]) {
#pragma unroll
  for (int k = 0; k < kStack; ++k) m[k] = static_cast<Acc>(-INFINITY), sum[k] = 0;
  constexpr int kAtOnce = Source::kAtOnce;
  for_classes(source, C, [&](int, const Acc(&z)[kAtOnce][kStack]) {
#pragma unroll
    for (int k = 0; k < kStack; ++k) {
      Acc largest = m[k], exps = 0;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) largest = fmax(largest, z[j][k]);          // ignores NaN
      const Acc base = largest == static_cast<Acc>(-INFINITY) ? Acc(0) : largest;  // -inf - -inf would be NaN
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) exps += exp_of(z[j][k] - base);
      sum[k] = sum[k] * exp_of(m[k] - base) + exps;
      m[k] = largest;
    }
  });
}

constexpr int kDenseRows = kSumRows + kCpgSum;  // of the partial sums: those that dense_forward writes

// Writes stats, with OHEM the losses, with BCL the scores, and the tile's sums.
template <typename Source>
__global__ void __launch_bounds__(kThreads, 2)
    dense_forward(const __grid_constant__ LossArgs args, typename Source::Acc* scores, double* partials) {
  using Acc = typename Source::Acc;
  SharedCutter shared;
  const typename Source::Tile tile(args);
  const Source source(args, tile, Source::take(args, shared));
  const int64_t pixels = args.N * args.H * args.W;
  Acc m[kStack], log_sum[kStack], nll[kStack];
  int label[kStack];
  sum_exps(source, static_cast<int>(args.C), m, log_sum);
  double sums[kDenseRows] = {};
  const auto loss_of_class = [&](int k, int c) { return (m[k] - source.own(k, c)) + log_sum[k]; };
  tile.for_each([&](int k) {
    log_sum[k] = log(log_sum[k]);
    label[k] = read_label(args, tile.n, tile.y(k), tile.x(k));
    // A bad label makes the loss NaN: an assert would end the process, and an error would let the host wait for it.
    nll[k] = label[k] >= 0 ? loss_of_class(k, label[k]) : static_cast<Acc>(label[k] == kBad ? nan("") : -1);
    if (label[k] == kIgnored) return;
    const Acc w = label[k] >= 0 ? weight_of<Acc>(args, label[k]) : Acc(1);
    sums[kSumRows + kCeSum] += w * nll[k];
    sums[kSumRows + kCeCount] += w;
    sums[kHard] += key_of(nll[k]) >= key_of(static_cast<Acc>(args.ohem_cutoff));
    sums[kSumRows + kValidPixels] += 1;
    sums[kSumRows + kBadLabels] += label[k] == kBad;
  });
  tile.store(m, static_cast<Acc*>(args.stats));
  tile.store(log_sum, static_cast<Acc*>(args.stats) + pixels);
  if (args.ohem) tile.store(nll, static_cast<Acc*>(args.nll));
  for (int s = 0; s < args.bcl_steps; ++s) {
    Acc q[kStack];
    tile.for_each([&](int k) {
      q[k] = label[k] < 0 ? Acc(-1)
                          : score_of(
                                args, s, tile, tile.y(k), tile.x(k), label[k], nll[k],
                                [&](int c) { return loss_of_class(k, c); });
    });
    tile.store(q, scores + s * pixels);
  }
  store_partials(sums, partials);
}

// Returns the derivative of the total by the cross-entropy of a pixel whose weight is 1.
template <typename Acc>
__device__ __forceinline__ Acc ce_scale(const LossArgs& args) {
  const Acc denominator = static_cast<const Acc*>(args.summary)[kDenominator];
  return denominator != 0 ? *static_cast<const Acc*>(args.grad_total) / denominator : Acc(0);
}

// Returns the pull of the cross-entropy and BCL on p of a pixel, towards its label. It is exactly 0 where neither
// selects the pixel.
template <typename Acc, typename F>
__device__ __forceinline__ Acc pull_of(const LossArgs& args, int64_t pixel, int label, Acc scale, F loss_of_class) {
  const Acc* summary = static_cast<const Acc*>(args.summary);
  if (label < 0) return label == kBad ? static_cast<Acc>(nan("")) : Acc(0);
  Acc pull = args.ce ? scale * weight_of<Acc>(args, label) : Acc(0);
  // The loss has the forward's bits, so that the same pixels are kept, those at the cutoff too.
  if (args.ohem && key_of(loss_of_class(label)) < key_of(summary[kCutoff])) pull = 0;
  if (args.bcl_steps > 0 && !args.bcl_flipped) {
#pragma unroll 1
    for (unsigned steps = steps_of(args, pixel); steps != 0; steps &= steps - 1)
      pull += bcl_scale<Acc>(args, summary[kSelected + __ffs(static_cast<int>(steps)) - 1]);
  }
  return pull;
}

// The dense gradient of a stack: the factor times p, minus the pull at the label. It is exactly 0 where both are. Here
// the factor is the pull: what CPG and flipped labels change about it is for sparse_backward, which adds that, or, to
// round once, writes the pixel's gradients again.
template <typename Source>
struct Pulls {
  using Acc = typename Source::Acc;
  Acc m[kStack] = {}, log_sum[kStack] = {}, pull[kStack] = {};
  int label[kStack] = {};

  __device__ __forceinline__ Pulls(const LossArgs& args, const typename Source::Tile& tile, const Source& source) {
    tile.load(static_cast<const Acc*>(args.stats), m);
    tile.load(static_cast<const Acc*>(args.stats) + args.N * args.H * args.W, log_sum);
    const Acc scale = ce_scale<Acc>(args);
    tile.for_each([&](int k) {
      label[k] = read_label(args, tile.n, tile.y(k), tile.x(k));
      pull[k] = pull_of<Acc>(args, tile.pixel(k), label[k], scale,
                             [&](int c) { return (m[k] - source.own(k, c)) + log_sum[k]; });
    });
  }
  __device__ __forceinline__ Acc probability(int k, Acc z) const { return exp_of((z - m[k]) - log_sum[k]); }
  __device__ __forceinline__ Acc of(int k, int c, Acc p) const {
    const Acc product = pull[k] != 0 ? pull[k] * p : Acc(0);  // 0 * NaN of an ignored pixel is 0 here
    return c == label[k] ? product - pull[k] : product;
  }
};

// Writes the gradients of the cross-entropy and of BCL (without its flipped labels) for each label pixel, class by
// class.
template <typename Source, typename Sink>
__global__ void __launch_bounds__(kThreads, Source::kBlocks)
    dense_backward(const __grid_constant__ LossArgs args, Sink sink) {
  using Acc = typename Source::Acc;
  SharedCutter shared;
  const typename Source::Tile tile(args);
  const Source source(args, tile, Source::take(args, shared));
  sink.begin(args, tile, shared.take<Acc>(Sink::scratch()));
  const Pulls<Source> pulls(args, tile, source);
  const int C = static_cast<int>(args.C);
  constexpr int kAtOnce = Source::kAtOnce;
  for_classes(source, C, [&](int first, Acc(&z)[kAtOnce][kStack]) {
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (first + j >= C) break;
#pragma unroll
      for (int k = 0; k < kStack; ++k) z[j][k] = pulls.of(k, first + j, pulls.probability(k, z[j][k]));
      sink.put(args, source, tile, first + j, z[j]);
    }
  });
  sink.finish(source);
}

}  // namespace bcmf::device
