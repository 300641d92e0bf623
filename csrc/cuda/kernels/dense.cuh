// The steps that read all logits: dense_forward and dense_backward.
#pragma once

#include "common/select.h"
#include "cuda/kernels/finish.cuh"
#include "cuda/kernels/sinks.cuh"
#include "cuda/kernels/sparse.cuh"

namespace bcmf::device {

// Finds m and the sum of exp(z - m) over the classes of a stack, reading the logits once: the sum is scaled down
// whenever m grows.
template <typename Source, typename Acc>
__device__ __forceinline__ void sum_exps(const Source& source, int C, Acc (&m)[kStack], Acc (&sum)[kStack]) {
#pragma unroll
  for (int k = 0; k < kStack; ++k) m[k] = lowest<Acc>(), sum[k] = 0;  // finite: -inf - -inf would be NaN
  for_classes(source, C, [&](int, const auto& z) {
#pragma unroll
    for (int k = 0; k < kStack; ++k) {
      constexpr int kCount = sizeof(z) / sizeof(z[0]);
      Acc largest = m[k];
#pragma unroll
      for (int j = 0; j < kCount; ++j) largest = fmax(largest, z[j][k]);  // ignores NaN
      Acc exps = exp_of(z[0][k] - largest);
#pragma unroll
      for (int j = 1; j < kCount; ++j) exps += exp_of(z[j][k] - largest);
      sum[k] = sum[k] * exp_of(m[k] - largest) + exps;
      m[k] = largest;
    }
  });
}

// The logarithm of a sum of exps of which one is 1; or of 0, or NaN. It is log_positive of csrc/cpu/math.h.
__device__ __forceinline__ float log_of(float x) {
#if defined(__CUDA_ARCH__)
  const int bits = __float_as_int(x) - 0x3f3504f3;  // of 1 / sqrt(2)
  const float e = static_cast<float>(bits >> 23), f = __int_as_float((bits & 0x007fffff) + 0x3f3504f3) - 1;
  float p = 7.0376836292e-2f;  // f^3 p is what is left of log(1 + f)
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float ff = f * f, y = f * ff * p + e * -2.12194440e-4f - 0.5f * ff + f + e * 0.693359375f;
  return x >= 1 ? y : x - INFINITY;
#else
  return log(x);
#endif
}
__device__ __forceinline__ double log_of(double x) { return log(x); }

// Reads the logits of a stack's reference classes (stats.cuh). patch_id: the label of all its pixels, or kMixed. Of
// classes before `begin` there are gradients in the place of what is staged.
template <typename Source, typename Acc>
__device__ __forceinline__ void read_references(const Source& source, const typename Source::Tile& tile, int patch_id,
                                                const int (&label)[kStack], int begin, Acc (&z)[kStack]) {
  const int c = reference_class(patch_id);
  if (patch_id != kMixed && c >= begin && source.is_ready(c))
    source.read(source.at(c), z);
  else
    tile.for_each([&](int k) { z[k] = source.own(k, reference_class(label[k])); });
}

// Tells whether both flips of a step bring the labels of a patch from that patch.
__device__ __forceinline__ bool flips_within_patch(int step) {
  static_assert(kPatchRows == 4 && kPatchColumns % 4 == 0);
  return step <= 2;  // they swap neighbours within groups of 2 or 4 pixels
}

// The shared memory of dense_forward.
template <typename Source>
struct ForwardMemory {
  typename Source::Staged staged;
  SharedArray<typename ScoreKeys<typename Source::Acc>::Key> keys;

  ForwardMemory(const LossArgs& args, SharedCutter& shared)
      : staged(Source::take(args, shared)), keys(ScoreKeys<typename Source::Acc>::take(args, shared)) {}
};

// Writes stats, with OHEM the losses, and the tile's sums: how many losses are above OHEM's threshold, the sum of the
// weighted losses, and that of the weights. With BCL it does the step bcl_select as far as a tile can.
template <typename Source>
__global__ void __launch_bounds__(kThreads, Source::kForwardBlocks)
    dense_forward(const __grid_constant__ LossArgs args, const __grid_constant__ Marks marks,
                  const __grid_constant__ ForwardMemory<Source> memory, Scores<typename Source::Acc> scores,
                  double* partials) {
  using Acc = typename Source::Acc;
  const typename Source::Tile tile(args);
  const Source source(args, tile, memory.staged);
  ScoreKeys<Acc> keys(memory.keys);
  if (args.bcl_steps > 0) keys.clear();
  Acc m[kStack], sum[kStack], of_label[kStack] = {}, nll[kStack];
  sum_exps(source, static_cast<int>(args.C), m, sum);
  Patch* patch = tile.has_patch() ? marks.patch(tile.n, tile.y(0), tile.x(0)) : nullptr;
  const int patch_id = patch ? marks.id_of(*patch) : kIgnored;
  int label[kStack] = {kIgnored, kIgnored, kIgnored, kIgnored};
  marks.load(tile, patch_id, label);
  read_references(source, tile, patch_id, label, 0, of_label);
  PixelStats<Acc> stats[kStack];
  Acc sums[2] = {};  // of losses, and of weights
  int hard = 0;
#pragma unroll
  for (int k = 0; k < kStack; ++k) {
    stats[k] = {m[k], log_of(sum[k])};
    // A bad label makes the loss NaN: an assert would end the process, and an error would let the host wait for it.
    nll[k] = label[k] >= 0 ? stats[k].loss(of_label[k]) : static_cast<Acc>(label[k] == kBad ? nan("") : -1);
    if (!tile.has(k) || label[k] == kIgnored) continue;
    const Acc w = label[k] >= 0 ? weight_of<Acc>(args, label[k]) : Acc(1);
    sums[0] += w * nll[k], sums[1] += w;
    if (args.ohem) hard += key_of(nll[k]) >= key_of(static_cast<Acc>(args.ohem_cutoff));
  }
  store_stats<Source>(args, tile, stats, of_label);
  if (args.ohem) tile.store(nll, static_cast<Acc*>(args.nll));
  uint8_t selected[kStack] = {};
  for (int s = 0; s < args.bcl_steps; ++s) {
    const int step = args.bcl_step[s];
    const bool flips_nothing = patch_id != kMixed && flips_within_patch(step);
    const auto loss_of_class = [&](int k, int c) { return stats[k].loss(source.own(k, c)); };
    Acc q[kStack] = {-1, -1, -1, -1}, chosen[2] = {};  // sums of the losses of selected pixels, and their number
    tile.for_each([&](int k) {
      if (label[k] >= 0)
        q[k] = flips_nothing ? nll[k] : score_of(marks, step, tile, tile.y(k), tile.x(k), label[k], nll[k], [&](int c) {
          return loss_of_class(k, c);
        });
    });
    const unsigned found = select_inside(args, marks, tile, q, scores.of_step(args, s), keys);
#pragma unroll
    for (int k = 0; k < kStack; ++k) {
      if ((found >> k & 1) == 0) continue;
      selected[k] = static_cast<uint8_t>(selected[k] | 1 << s);
      chosen[0] += selected_loss<Acc>(args, marks, step, tile, tile.y(k), tile.x(k), label[k],
                                      [&](int c) { return c == label[k] ? nll[k] : loss_of_class(k, c); });
      chosen[1] += 1;
    }
    store_partials(chosen, partials + (kSumRows + kBclSums + 2 * s) * static_cast<int64_t>(gridDim.x));
  }
  if (args.bcl_steps > 0) {
    tile.store(selected, static_cast<uint8_t*>(args.selected));
    const bool any = __any_sync(0xffffffffu, selected[0] || selected[1] || selected[2] || selected[3]);
    if (any && threadIdx.x % kWarp == 0) patch->selected = 1;
  }
  store_partials(sums, partials + (kSumRows + kCeSum) * static_cast<int64_t>(gridDim.x));
  if (!args.ohem) return;
  hard = sum_of_block(hard);
  if (threadIdx.x == 0) partials[kHard * static_cast<int64_t>(gridDim.x) + blockIdx.x] = hard;
}

// Returns the derivative of the total by the cross-entropy of a pixel whose weight is 1.
template <typename Acc>
__device__ __forceinline__ Acc ce_scale(const LossArgs& args) {
  const Acc denominator = static_cast<const Acc*>(args.summary)[kDenominator];
  return denominator != 0 ? *static_cast<const Acc*>(args.grad_total) / denominator : Acc(0);
}

// The gradient of a stack, but for its extras (sparse.cuh), is of_p p, minus the pull for the class of the label. The
// pull is the scale of the cross-entropy and of BCL without flips, and of_p the pull and the factor together. Both are
// exactly 0 where nothing selects the pixel.
template <typename Acc>
struct Pulls {
  Acc pull[kStack], of_p[kStack];
  int place[kStack];  // in the list of those that have extras
  bool all;           // every pixel of the stack has an of_p

  // Finds them, after `sparse` has found the factors. loss_of_label(k) is that of pixel k of the stack.
  template <typename Stack, typename Entries, typename F>
  __device__ __forceinline__ Pulls(const LossArgs& args, const Stack& tile, const Patch* patch,
                                   const int (&label)[kStack], const SparseGradient<Entries>& sparse, F loss_of_label)
      : all(true) {
    const Acc* summary = static_cast<const Acc*>(args.summary);
    const Acc of_ce = args.ce ? ce_scale<Acc>(args) : Acc(0);
#pragma unroll
    for (int k = 0; k < kStack; ++k) {
      pull[k] = label[k] >= 0 ? of_ce : static_cast<Acc>(label[k] == kBad ? nan("") : 0);
      if (args.weight && label[k] >= 0) pull[k] *= weight_of<Acc>(args, label[k]);
      // The loss has the forward's bits, so that the same pixels are kept, those at the cutoff too.
      if (args.ohem && tile.has(k) && label[k] >= 0 && key_of(loss_of_label(k)) < key_of(summary[kCutoff])) pull[k] = 0;
    }
    if (args.bcl_steps > 0 && !args.bcl_flipped && patch && patch->selected != 0) {
      uint8_t selected[kStack] = {};
      tile.load(static_cast<const uint8_t*>(args.selected), selected);
      for (int s = 0; s < args.bcl_steps; ++s) {
        const Acc of_step = bcl_scale<Acc>(args, summary[kSelected + s]);
#pragma unroll
        for (int k = 0; k < kStack; ++k)
          if (label[k] >= 0 && (selected[k] >> s & 1)) pull[k] += of_step;
      }
    }
    sparse.load_places(tile, place);
#pragma unroll
    for (int k = 0; k < kStack; ++k) {
      of_p[k] = place[k] != sparse.kNone ? pull[k] + sparse.factor(place[k]) : pull[k];
      all = all && of_p[k] != 0;
    }
  }
};

// Writes the gradient of kCount classes of a stack from c on, but for what labels add.
template <int kCount, typename Source, typename Sink, typename From, typename To, typename Acc, typename Entries>
__device__ __forceinline__ void put_classes(const Source& source, const Sink& sink, const typename Source::Tile& tile,
                                            const PixelStats<Acc> (&stats)[kStack], const Pulls<Acc>& pulls,
                                            SparseGradient<Entries>& sparse, int c, From& from, To& to) {
  Acc z[kCount][kStack];
  read_classes<true>(source, from, z);
#pragma unroll
  for (int j = 0; j < kCount; ++j)
#pragma unroll
    for (int k = 0; k < kStack; ++k) z[j][k] = pulls.of_p[k] * stats[k].probability(z[j][k]);
  if (!pulls.all) {
#pragma unroll
    for (int j = 0; j < kCount; ++j)
#pragma unroll
      for (int k = 0; k < kStack; ++k)
        if (pulls.of_p[k] == 0) z[j][k] = 0;  // p of an ignored pixel may be NaN
  }
  if (sparse.next_class() < c + kCount) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (c + j != sparse.next_class()) continue;
#pragma unroll
      for (int k = 0; k < kStack; ++k)
        if (pulls.place[k] != sparse.kNone) z[j][k] += sparse.extra(sparse.next_rank(), pulls.place[k]);
      sparse.advance();
    }
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j, to = sink.next(to)) sink.put(source, tile, to, z[j]);
}

// Writes the gradients of the label's class of a stack again, if that is one of begin..end-1. z: the logits of that
// class.
template <typename Source, typename Sink, typename Acc, typename Entries>
__device__ __forceinline__ void put_labels(const Source& source, const Sink& sink, const typename Source::Tile& tile,
                                           const PixelStats<Acc> (&stats)[kStack], const Pulls<Acc>& pulls,
                                           const SparseGradient<Entries>& sparse, const int (&label)[kStack],
                                           const Acc (&z)[kStack], int patch_id, int begin, int end) {
  Acc value[kStack];
#pragma unroll
  for (int k = 0; k < kStack; ++k) {
    const Acc of_p = pulls.of_p[k] != 0 ? pulls.of_p[k] * stats[k].probability(z[k]) : Acc(0);
    const bool listed = pulls.place[k] != sparse.kNone && label[k] >= begin && label[k] < end;
    const int rank = listed ? sparse.rank(label[k]) : -1;
    value[k] = of_p - pulls.pull[k] + (rank >= 0 ? sparse.extra(rank, pulls.place[k]) : Acc(0));
  }
  if (patch_id != kMixed) {
    if (patch_id >= begin && patch_id < end) sink.put(source, tile, sink.at(patch_id), value);
  } else {
    tile.for_each([&](int k) {
      if (label[k] >= begin && label[k] < end) sink.put_one(source, tile, k, label[k], value[k]);
    });
  }
}

// The shared memory of dense_backward.
template <typename Source>
struct BackwardMemory {
  typename Source::Staged staged;
  SparseMemory<typename Source::Acc> sparse;

  BackwardMemory(const LossArgs& args, SharedCutter& shared)
      : staged(Source::take(args, shared)), sparse(args, shared) {}
};

// Writes the gradient, for each label pixel, class by class. The steps cpg_residuals, cpg_shares and sparse_backward
// are part of this kernel.
template <typename Source, typename Sink>
__global__ void __launch_bounds__(kThreads, Source::kBlocks)
    dense_backward(const __grid_constant__ LossArgs args, const __grid_constant__ Marks marks,
                   const __grid_constant__ BackwardMemory<Source> memory, Sink sink) {
  using Acc = typename Source::Acc;
  using Entries = typename Source::Entries;
  const typename Source::Tile tile(args);
  const Source source(args, tile, memory.staged);
  const Entries entries(args);
  SparseGradient<Entries> sparse(args, memory.sparse);
  const int C = static_cast<int>(args.C);
  constexpr int kAtOnce = Source::kAtOnce;
  for (int begin = 0, end = 0; begin < C; begin = end) {  // usually once
    end = sparse.find_extras(marks, tile, entries, begin);
    const Patch* patch = tile.has_patch() ? marks.patch(tile.n, tile.y(0), tile.x(0)) : nullptr;
    const int patch_id = patch ? marks.id_of(*patch) : kIgnored;
    int label[kStack] = {kIgnored, kIgnored, kIgnored, kIgnored};
    marks.load(tile, patch_id, label);
    Acc of_label[kStack] = {};
    read_references(source, tile, patch_id, label, begin, of_label);
    PixelStats<Acc> stats[kStack];
    load_stats(args, tile, source, of_label, stats);
    const Pulls<Acc> pulls(args, tile, patch, label, sparse, [&](int k) { return stats[k].loss(of_label[k]); });
    int c = begin;
    auto from = source.at(c);
    auto to = sink.at(c);
#pragma unroll 1
    for (; c + kAtOnce <= end; c += kAtOnce)
      put_classes<kAtOnce>(source, sink, tile, stats, pulls, sparse, c, from, to);
    with_number<kAtOnce - 1>(end - c, [&](auto count) {
      put_classes<decltype(count)::value>(source, sink, tile, stats, pulls, sparse, c, from, to);
    });
    put_labels(source, sink, tile, stats, pulls, sparse, label, of_label, patch_id, begin, end);
  }
  sink.finish(source);
}

}  // namespace bcmf::device
