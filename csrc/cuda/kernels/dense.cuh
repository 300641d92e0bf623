// The steps that read all logits: dense_forward and dense_backward.
#pragma once

#include "common/select.h"
#include "cuda/kernels/finish.cuh"
#include "cuda/kernels/sparse.cuh"

namespace bcmf::device {

// Finds m and the sum of exp(z - m) over the classes of a stack, reading the logits once: the sum is scaled down
// whenever m grows.
template <typename Source, typename Acc>
__device__ __forceinline__ void sum_exps(const Source& source, int C, Acc (&m)[kStack], Acc (&sum)[kStack]) {
#pragma unroll
  for (int k = 0; k < kStack; ++k) m[k] = lowest<Acc>(), sum[k] = 0;  // finite: -inf - -inf would be NaN
  constexpr int kAtOnce = Source::kAtOnce;
  for_classes(source, 0, C, [&](int, const Acc(&z)[kAtOnce][kStack]) {
#pragma unroll
    for (int k = 0; k < kStack; ++k) {
      Acc largest = m[k], exps = 0;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) largest = fmax(largest, z[j][k]);  // ignores NaN
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) exps += exp_of(z[j][k] - largest);
      sum[k] = sum[k] * exp_of(m[k] - largest) + exps;
      m[k] = largest;
    }
  });
}

// Tells whether both flips of a step bring the labels of a patch from that patch.
__device__ __forceinline__ bool flips_within_patch(int step) {
  static_assert(kPatchRows == 4 && kPatchColumns % 4 == 0);
  return step <= 2;  // they swap neighbours within groups of 2 or 4 pixels
}

// Writes stats, with OHEM the losses, with BCL the scores, and the tile's sums: how many losses are above OHEM's
// threshold, the sum of the weighted losses, and that of the weights.
template <typename Source>
__global__ void __launch_bounds__(kThreads, 2)
    dense_forward(const __grid_constant__ LossArgs args, typename Source::Acc* scores, double* partials) {
  using Acc = typename Source::Acc;
  SharedCutter shared;
  const typename Source::Tile tile(args);
  const Source source(args, tile, Source::take(args, shared));
  const Marks marks(args);
  const int64_t pixels = args.N * args.H * args.W;
  Acc m[kStack], log_sum[kStack], nll[kStack];
  sum_exps(source, static_cast<int>(args.C), m, log_sum);
  Patch* patch = tile.has_patch() ? marks.patch(tile.n, tile.y(0), tile.x(0)) : nullptr;
  const int patch_id = patch ? marks.id_of(*patch) : kIgnored;
  int label[kStack];
  marks.load(tile, patch_id, label);
  double loss[1] = {}, weights[1] = {};
  int hard[1] = {};
  const auto loss_of_class = [&](int k, int c) { return (m[k] - source.own(k, c)) + log_sum[k]; };
  Acc of_label[kStack] = {};
  if (patch_id >= 0 && source.is_ready(patch_id))
    source.stack(patch_id, of_label);
  else
    tile.for_each([&](int k) { of_label[k] = label[k] >= 0 ? source.own(k, label[k]) : Acc(0); });
  tile.for_each([&](int k) {
    log_sum[k] = log(log_sum[k]);
    // A bad label makes the loss NaN: an assert would end the process, and an error would let the host wait for it.
    nll[k] = label[k] >= 0 ? (m[k] - of_label[k]) + log_sum[k] : static_cast<Acc>(label[k] == kBad ? nan("") : -1);
    if (label[k] == kIgnored) return;
    const Acc w = label[k] >= 0 ? weight_of<Acc>(args, label[k]) : Acc(1);
    loss[0] += w * nll[k];
    weights[0] += w;
    hard[0] += key_of(nll[k]) >= key_of(static_cast<Acc>(args.ohem_cutoff));
  });
  tile.store(m, static_cast<Acc*>(args.stats));
  tile.store(log_sum, static_cast<Acc*>(args.stats) + pixels);
  if (args.ohem) tile.store(nll, static_cast<Acc*>(args.nll));
  for (int s = 0; s < args.bcl_steps && patch; ++s) {
    const int step = args.bcl_step[s];
    const bool flips_nothing = patch_id != kMixed && flips_within_patch(step);
    Acc q[kStack];
    tile.for_each([&](int k) {
      q[k] = label[k] < 0    ? Acc(-1)
             : flips_nothing ? nll[k]
                             : score_of(
                                   marks, step, tile, tile.y(k), tile.x(k), label[k], nll[k],
                                   [&](int c) { return loss_of_class(k, c); });
    });
    const unsigned hot = store_hot(tile, q, static_cast<Acc>(args.bcl_cutoff), scores + s * pixels);
    if (threadIdx.x % kWarp == 0) patch->hot[s] = static_cast<uint8_t>(hot);
  }
  const int64_t tiles = gridDim.x;
  store_partials(loss, partials + (kSumRows + kCeSum) * tiles);
  if (args.weight) store_partials(weights, partials + (kSumRows + kCeCount) * tiles);
  if (args.ohem) store_partials(hard, partials + kHard * tiles);
}

// Returns the derivative of the total by the cross-entropy of a pixel whose weight is 1.
template <typename Acc>
__device__ __forceinline__ Acc ce_scale(const LossArgs& args) {
  const Acc denominator = static_cast<const Acc*>(args.summary)[kDenominator];
  return denominator != 0 ? *static_cast<const Acc*>(args.grad_total) / denominator : Acc(0);
}

// Returns the pull of the cross-entropy and BCL on p of a pixel, towards its label. It is exactly 0 where neither
// selects the pixel. may_be_selected: whether BCL selects any pixel of its patch.
template <typename Acc, typename F>
__device__ __forceinline__ Acc pull_of(const LossArgs& args, int64_t pixel, int label, bool may_be_selected, Acc scale,
                                       F loss_of_class) {
  const Acc* summary = static_cast<const Acc*>(args.summary);
  if (label < 0) return label == kBad ? static_cast<Acc>(nan("")) : Acc(0);
  Acc pull = args.ce ? scale * weight_of<Acc>(args, label) : Acc(0);
  // The loss has the forward's bits, so that the same pixels are kept, those at the cutoff too.
  if (args.ohem && key_of(loss_of_class(label)) < key_of(summary[kCutoff])) pull = 0;
  if (args.bcl_steps > 0 && !args.bcl_flipped && may_be_selected) {
#pragma unroll 1
    for (unsigned steps = steps_of(args, pixel); steps != 0; steps &= steps - 1)
      pull += bcl_scale<Acc>(args, summary[kSelected + __ffs(static_cast<int>(steps)) - 1]);
  }
  return pull;
}

// The gradient of a stack without its extras (sparse.cuh): p (pull + factor), minus the pull at the label. It is
// exactly 0 where these are.
template <typename Acc>
struct Pulls {
  Acc m[kStack] = {}, log_sum[kStack] = {}, pull[kStack] = {}, of_p[kStack] = {};
  int label[kStack] = {}, place[kStack];
  int patch_id;  // the label of all of them, or kMixed

  // logit(k, c) is that of class c at pixel k of the stack.
  template <typename Stack, typename Entries, typename F>
  __device__ __forceinline__ Pulls(const LossArgs& args, const Marks& marks, const Stack& tile,
                                   const SparseGradient<Entries>& sparse, F logit) {
    const Patch* patch = tile.has_patch() ? marks.patch(tile.n, tile.y(0), tile.x(0)) : nullptr;
    patch_id = patch ? marks.id_of(*patch) : kIgnored;
    marks.load(tile, patch_id, label);
    tile.load(static_cast<const Acc*>(args.stats), m);
    tile.load(static_cast<const Acc*>(args.stats) + args.N * args.H * args.W, log_sum);
    const Acc scale = ce_scale<Acc>(args);
    tile.for_each([&](int k) {
      of_p[k] = pull[k] = pull_of<Acc>(args, tile.pixel(k), label[k], patch->selected != 0, scale,
                                       [&](int c) { return (m[k] - logit(k, c)) + log_sum[k]; });
    });
#pragma unroll
    for (int k = 0; k < kStack; ++k) {
      place[k] = sparse.any() ? sparse.place(tile.row(k), tile.column(k)) : sparse.kNone;
      if (place[k] != sparse.kNone) of_p[k] += sparse.factor(place[k]);
    }
  }
  __device__ __forceinline__ Acc probability(int k, Acc z) const { return exp_of((z - m[k]) - log_sum[k]); }
  // Replaces the probabilities of class c by its gradients.
  __device__ __forceinline__ void apply(int c, Acc (&p)[kStack]) const {
#pragma unroll
    for (int k = 0; k < kStack; ++k) p[k] = of_p[k] != 0 ? of_p[k] * p[k] : Acc(0);  // 0 * NaN of an ignored pixel is 0
    if (patch_id == kMixed) {
#pragma unroll
      for (int k = 0; k < kStack; ++k)
        if (c == label[k]) p[k] -= pull[k];
    } else if (c == patch_id) {
#pragma unroll
      for (int k = 0; k < kStack; ++k) p[k] -= pull[k];
    }
  }
};

// Writes the gradient, for each label pixel, class by class. The steps cpg_edges, cpg_residuals, cpg_shares and
// sparse_backward are part of this kernel.
template <typename Source, typename Sink>
__global__ void __launch_bounds__(kThreads, Source::kBlocks)
    dense_backward(const __grid_constant__ LossArgs args, Sink sink) {
  using Acc = typename Source::Acc;
  using Entries = typename Source::Entries;
  SharedCutter shared;
  const typename Source::Tile tile(args);
  const Source source(args, tile, Source::take(args, shared));
  const Marks marks(args);
  const Entries entries(args);
  SparseGradient<Entries> sparse(args, shared);
  sink.begin(args, tile, shared.take<Acc>(Sink::scratch()));
  sparse.load(marks, tile, entries);
  const Pulls<Acc> pulls(args, marks, tile, sparse, [&](int k, int c) { return source.own(k, c); });
  const int C = static_cast<int>(args.C);
  constexpr int kAtOnce = Source::kAtOnce;
  for (int begin = 0, end = 0; begin < C; begin = end) {
    end = sparse.find_extras(marks, tile, entries, begin);
    int held = 0, next = sparse.next(begin);  // of the classes from `begin` on, those that have extras
    for_classes(source, begin, end, [&](int first, Acc(&z)[kAtOnce][kStack]) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (first + j >= end) break;
#pragma unroll
        for (int k = 0; k < kStack; ++k) z[j][k] = pulls.probability(k, z[j][k]);
        pulls.apply(first + j, z[j]);
        if (first + j == next) {
#pragma unroll
          for (int k = 0; k < kStack; ++k)
            if (pulls.place[k] != sparse.kNone) z[j][k] += sparse.extra(held, pulls.place[k]);
          ++held, next = sparse.next(next + 1);
        }
        sink.put(args, source, tile, first + j, z[j]);
      }
    });
  }
  sink.finish(source);
}

}  // namespace bcmf::device
