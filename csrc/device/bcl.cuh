// BCL: the score of a pixel, which scores are maxima, and what the selected pixels add to the gradient.
#pragma once

#include "logits.cuh"

namespace bcmf::device {

// The classes that the two flips of a step bring to a pixel.
struct Flipped {
  int by_rows, by_columns;
  __device__ __forceinline__ Flipped(const LossArgs& args, int step, int64_t n, int64_t y, int64_t x)
      : by_rows(class_at(args, n, flip_index(y, step, args.H), x)),
        by_columns(class_at(args, n, y, flip_index(x, step, args.W))) {}
};

// q of a pixel with a label: the largest of its three losses; -1 where a flipped label is ignored.
template <typename Acc, typename F>
__device__ __forceinline__ Acc score_of(const LossArgs& args, int s, int64_t n, int64_t y, int64_t x, int label,
                                        Acc nll, F loss_of_class) {
  const Flipped flipped(args, args.bcl_step[s], n, y, x);
  if (flipped.by_rows == kIgnored || flipped.by_columns == kIgnored) return Acc(-1);
  Acc score = nll;
  const int others[] = {flipped.by_rows, flipped.by_columns};
  for (const int other : others) {
    if (other == label) continue;
    const Acc loss = loss_of_class(other);
    score = loss > score ? loss : score;
  }
  return score;
}

// The larger of two scores; NaN is larger than all.
template <typename Acc>
__device__ __forceinline__ Acc larger(Acc a, Acc b) {
  return b > a || b != b ? b : a;
}

// The largest score of a pixel's neighbourhood, clipped at the border.
template <typename Acc>
__device__ __forceinline__ Acc pooled_score(const LossArgs& args, const Acc* image, int64_t y, int64_t x) {
  const int radius = args.bcl_nms_radius;
  Acc pooled = image[y * args.W + x];
  for (int64_t v = y < radius ? 0 : y - radius; v <= y + radius && v < args.H; ++v)
    for (int64_t u = x < radius ? 0 : x - radius; u <= x + radius && u < args.W; ++u)
      pooled = larger(pooled, image[v * args.W + u]);
  return pooled;
}

// Selects: a bit per step in `selected`; and by step partial sums, (2, tiles), of what is supervised and of pixels.
template <typename Source>
__global__ void __launch_bounds__(kThreads, 2)
    bcl_tiles(const __grid_constant__ LossArgs args, const typename Source::Acc* scores, double* partials) {
  using Acc = typename Source::Acc;
  const Tile tile(args);
  const Source source(args, tile);
  const int64_t pixels = args.N * args.H * args.W;
  const Acc cutoff = static_cast<Acc>(args.bcl_cutoff);
  uint8_t selected[kStack] = {};
  for (int s = 0; s < args.bcl_steps; ++s) {
    const Acc* image = scores + s * pixels + tile.n * args.H * args.W;
    double sums[2] = {};
    for_stack(tile, [&](int k) {
      const int64_t y = tile.y(k), x = tile.x(), pixel = tile.pixel(args, k);
      const Acc q = image[y * args.W + x];
      if (!(q > cutoff && q == pooled_score(args, image, y, x)) && q == q) return;
      selected[k] = static_cast<uint8_t>(selected[k] | 1 << s);
      const auto loss = [&](int c) {
        const Acc* m = static_cast<const Acc*>(args.stats) + pixel;
        return (m[0] - source.at(tile.n, y, x, c)) + m[pixels];
      };
      if (args.bcl_flipped) {
        const Flipped flipped(args, args.bcl_step[s], tile.n, y, x);
        sums[0] += static_cast<Acc>(args.bcl_alpha) * loss(flipped.by_rows) +
                   static_cast<Acc>(args.bcl_beta) * loss(flipped.by_columns);
      } else {
        sums[0] += loss(class_at(args, tile.n, y, x));
      }
      sums[1] += 1;
    });
    store_partials(sums, partials + 2 * s * static_cast<int64_t>(gridDim.x));
  }
  for_stack(tile, [&](int k) { static_cast<uint8_t*>(args.selected)[tile.pixel(args, k)] = selected[k]; });
}

// Derivative of the total by a selected pixel's loss; `count` is what its step is averaged over.
template <typename Acc>
__device__ __forceinline__ Acc bcl_scale(const LossArgs& args, Acc count) {
  const Acc upstream = *static_cast<const Acc*>(args.grad_total);
  return count != 0 ? upstream * static_cast<Acc>(args.bcl_weight / args.bcl_steps) / count : Acc(0);
}

// What the flipped labels of a pixel ask of p altogether.
template <typename Acc>
__device__ __forceinline__ Acc flipped_pull(const LossArgs& args, int64_t pixel) {
  if (!args.bcl_flipped) return 0;
  const Acc share = bcl_scale<Acc>(args, static_cast<const Acc*>(args.summary)[kValid]);
  const uint8_t selected = static_cast<const uint8_t*>(args.selected)[pixel];
  Acc pull = 0;
  for (int s = 0; s < args.bcl_steps; ++s)
    if (selected >> s & 1) pull += share * static_cast<Acc>(args.bcl_alpha + args.bcl_beta);
  return pull;
}

// The part of it that is for class c.
template <typename Acc>
__device__ __forceinline__ Acc flipped_pull_of(const LossArgs& args, int64_t n, int64_t y, int64_t x, int64_t c) {
  const uint8_t selected = static_cast<const uint8_t*>(args.selected)[(n * args.H + y) * args.W + x];
  if (selected == 0) return 0;
  const Acc share = bcl_scale<Acc>(args, static_cast<const Acc*>(args.summary)[kValid]);
  Acc pull = 0;
  for (int s = 0; s < args.bcl_steps; ++s) {
    if (!(selected >> s & 1)) continue;
    const Flipped flipped(args, args.bcl_step[s], n, y, x);
    if (flipped.by_rows == c) pull += share * static_cast<Acc>(args.bcl_alpha);
    if (flipped.by_columns == c) pull += share * static_cast<Acc>(args.bcl_beta);
  }
  return pull;
}

}  // namespace bcmf::device
