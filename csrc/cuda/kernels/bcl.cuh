// The Boundary Corrected Loss (BCL): the score of a pixel, the step bcl_select, and what the selected pixels add to the
// gradient.
#pragma once

#include "cuda/kernels/logits.cuh"

namespace bcmf::device {

// The classes that the two flips of a step bring to a pixel.
struct Flipped {
  int by_rows, by_columns;
  __device__ __forceinline__ Flipped(const LossArgs& args, int step, const Tile& tile, int y, int x)
      : by_rows(class_at(args, tile.n, flip(y, step, tile.H), x)),
        by_columns(class_at(args, tile.n, y, flip(x, step, tile.W))) {}

 private:
  static __device__ __forceinline__ int flip(int i, int step, int length) {  // unsigned: i + step may pass 2^31
    return static_cast<int>(flip_index<unsigned>(i, step, length));
  }
};

// Returns the score of a pixel that has a class: the largest of its three losses, or -1 if a flipped label is ignored.
template <typename Acc, typename F>
__device__ __forceinline__ Acc score_of(const LossArgs& args, int s, const Tile& tile, int y, int x, int label, Acc nll,
                                        F loss_of_class) {
  const Flipped flipped(args, args.bcl_step[s], tile, y, x);
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

// Returns the largest score of a pixel's neighbourhood, which is clipped at the border.
template <typename Acc>
__device__ __forceinline__ Acc pooled_score(const LossArgs& args, const Tile& tile, const Acc* image, int y, int x) {
  const int radius = args.bcl_nms_radius;
  const int top = y < radius ? 0 : y - radius, bottom = tile.H - 1 - y < radius ? tile.H - 1 : y + radius;
  const int left = x < radius ? 0 : x - radius, right = tile.W - 1 - x < radius ? tile.W - 1 : x + radius;
  Acc pooled = image[static_cast<int64_t>(y) * tile.W + x];
  for (int v = top; v <= bottom; ++v)
    for (int u = left; u <= right; ++u) pooled = larger(pooled, image[static_cast<int64_t>(v) * tile.W + u]);
  return pooled;
}

// Writes `selected`, in which each of BCL's steps has a bit, and for each step partial sums (2, tiles): of the losses
// at its selected pixels, and of their number.
template <typename Entries>
__global__ void __launch_bounds__(kThreads, 2)
    bcl_select(const __grid_constant__ LossArgs args, const typename Entries::Acc* scores, double* partials) {
  using Acc = typename Entries::Acc;
  const Stacks<false> tile(args);
  const Entries entries(args);
  const int64_t pixels = args.N * args.H * args.W;
  const Acc cutoff = static_cast<Acc>(args.bcl_cutoff);
  uint8_t selected[kStack] = {};
  for (int s = 0; s < args.bcl_steps; ++s) {
    const Acc* image = scores + s * pixels + tile.n * args.H * args.W;
    double sums[2] = {};
    const auto supervise = [&](int k) {
      // The scores come from an earlier reading of labels that may have changed: there may be no class here now.
      const auto loss = [&](int c) -> Acc {
        if (c == kIgnored) return 0;
        const Acc* m = static_cast<const Acc*>(args.stats) + tile.pixel(k);
        return (m[0] - entries.at(tile.n, tile.y(k), tile.x(k), c)) + m[pixels];
      };
      if (!args.bcl_flipped) return loss(class_at(args, tile.n, tile.y(k), tile.x(k)));
      const Flipped flipped(args, args.bcl_step[s], tile, tile.y(k), tile.x(k));
      return static_cast<Acc>(args.bcl_alpha) * loss(flipped.by_rows) +
             static_cast<Acc>(args.bcl_beta) * loss(flipped.by_columns);
    };
    unsigned found = 0;
    tile.for_each([&](int k) {
      const Acc q = scores[s * pixels + tile.pixel(k)];
      if ((q > cutoff && q == pooled_score(args, tile, image, tile.y(k), tile.x(k))) || q != q) found |= 1u << k;
    });
    for (int k = 0; k < kStack; ++k) {  // few pixels are selected: one copy of the code is enough
      if (!(found >> k & 1)) continue;
      sums[0] += supervise(k);
      sums[1] += 1;
    }
#pragma unroll
    for (int k = 0; k < kStack; ++k) selected[k] = static_cast<uint8_t>(selected[k] | (found >> k & 1) << s);
    store_partials(sums, partials + 2 * s * static_cast<int64_t>(gridDim.x));
  }
  tile.store(selected, static_cast<uint8_t*>(args.selected));
}

// Returns the steps that selected a pixel, a bit each. Bits of steps that do not exist are masked, whoever wrote them.
__device__ __forceinline__ unsigned steps_of(const LossArgs& args, int64_t pixel) {
  return static_cast<const uint8_t*>(args.selected)[pixel] & ((1u << args.bcl_steps) - 1);
}

// Returns the sum of the pulls towards a pixel's flipped labels, which its factor grows by.
template <typename Acc>
__device__ __forceinline__ Acc flipped_pull(const LossArgs& args, unsigned selected) {
  if (selected == 0) return 0;
  const Acc scale = bcl_scale<Acc>(args, static_cast<const Acc*>(args.summary)[kValid]);
  return static_cast<Acc>(__popc(selected)) * scale * static_cast<Acc>(args.bcl_alpha + args.bcl_beta);
}

// Returns the part of these pulls that is towards class c.
template <typename Acc>
__device__ __forceinline__ Acc flipped_pull_of(const LossArgs& args, unsigned selected, const Tile& tile, int y, int x,
                                               int c) {
  const Acc scale = bcl_scale<Acc>(args, static_cast<const Acc*>(args.summary)[kValid]);
  Acc pull = 0;
  for (unsigned steps = selected; steps != 0; steps &= steps - 1) {
    const Flipped flipped(args, args.bcl_step[__ffs(static_cast<int>(steps)) - 1], tile, y, x);
    if (flipped.by_rows == c) pull += scale * static_cast<Acc>(args.bcl_alpha);
    if (flipped.by_columns == c) pull += scale * static_cast<Acc>(args.bcl_beta);
  }
  return pull;
}

}  // namespace bcmf::device
