// What the forward leaves of each pixel, from which later steps find the loss and the probability of any class.
#pragma once

#include "cuda/kernels/logits.cuh"

namespace bcmf::device {

// The loss of a class with the logit z is (reference - z) + rest. With the largest logit as the reference the rest is
// the logarithm of the sum of exp(z - reference).
template <typename Acc>
struct PixelStats {
  Acc reference, rest;

  __device__ __forceinline__ Acc loss(Acc z) const { return (reference - z) + rest; }
  __device__ __forceinline__ Acc probability(Acc z) const { return exp_shifted(z - reference, exp_shift(rest)); }
};

// Resampled logits keep both, (2, N, H, W). Of logits of the labels' size memory is what limits the kernels. They keep
// one number for each pixel, (N, H, W), of one of two kinds, which the sign bit tells apart:
// * without the sign bit, the loss of the reference class: of the label, or of class 0 where there is none. Its logit
// is
//   the reference, and is read again;
// * with the sign bit, where that loss is 8 or more, which would leave the probabilities of likelier classes too few
//   digits: minus the rest by the largest logit, which is looked for again.
BCMF_HOST_DEVICE int64_t stats_maps(const LossArgs& args) { return args.resampled() ? 2 : 1; }

__device__ __forceinline__ int reference_class(int label) { return label < 0 ? 0 : label; }

// Returns the number that is kept instead of `found`, whose reference is the largest logit. z: that of reference_class.
template <typename Acc>
__device__ __forceinline__ Acc pack_stats(const PixelStats<Acc>& found, Acc z) {
  const Acc loss = found.loss(z);
  return loss < 8 ? loss : -found.rest;
}
// Undoes it; logit(c) is that of class c.
template <typename Acc, typename F>
__device__ __forceinline__ PixelStats<Acc> unpack_stats(Acc kept, Acc z, int64_t C, F logit) {
  if (!signbit(kept)) return {z, kept};
  Acc largest = lowest<Acc>();
  for (int c = 0; c < C; ++c) largest = fmax(largest, logit(c));
  return {largest, -kept};
}

// Writes the statistics of a stack, whose references are the largest logits. z: the logits of its reference classes.
template <typename Source, typename Acc>
__device__ __forceinline__ void store_stats(const LossArgs& args, const typename Source::Tile& tile,
                                            const PixelStats<Acc> (&stats)[kStack], const Acc (&z)[kStack]) {
  Acc first[kStack], second[kStack];
#pragma unroll
  for (int k = 0; k < kStack; ++k) {
    first[k] = Source::kPacksStats ? pack_stats(stats[k], z[k]) : stats[k].reference;
    second[k] = stats[k].rest;
  }
  tile.store(first, static_cast<Acc*>(args.stats));
  if (!Source::kPacksStats) tile.store(second, static_cast<Acc*>(args.stats) + args.N * args.H * args.W);
}

// Reads the statistics of a stack of resampled logits.
template <typename Stack, typename Acc>
__device__ __forceinline__ void load_stats(const LossArgs& args, const Stack& tile, PixelStats<Acc> (&stats)[kStack]) {
  Acc reference[kStack] = {}, rest[kStack] = {};
  tile.load(static_cast<const Acc*>(args.stats), reference);
  tile.load(static_cast<const Acc*>(args.stats) + args.N * args.H * args.W, rest);
#pragma unroll
  for (int k = 0; k < kStack; ++k) stats[k] = {reference[k], rest[k]};
}
// Reads the statistics of a stack of any logits. z: those of its reference classes.
template <typename Source, typename Acc>
__device__ __forceinline__ void load_stats(const LossArgs& args, const typename Source::Tile& tile,
                                           const Source& source, const Acc (&z)[kStack],
                                           PixelStats<Acc> (&stats)[kStack]) {
  if constexpr (!Source::kPacksStats) return load_stats(args, tile, stats);
  Acc kept[kStack] = {};
  tile.load(static_cast<const Acc*>(args.stats), kept);
#pragma unroll
  for (int k = 0; k < kStack; ++k)
    stats[k] = unpack_stats(kept[k], z[k], args.C, [&](int c) { return source.own(k, c); });
}

// Reads the statistics of any pixel (n, y, x).
template <typename Entries>
__device__ __forceinline__ PixelStats<typename Entries::Acc> stats_at(const LossArgs& args, const Entries& entries,
                                                                      int64_t n, int y, int x, int label) {
  using Acc = typename Entries::Acc;
  const Acc* kept = static_cast<const Acc*>(args.stats) + (n * args.H + y) * args.W + x;
  if constexpr (Entries::kPacksStats)
    return unpack_stats(*kept, entries.at(n, y, x, reference_class(label)), args.C,
                        [&](int c) { return entries.at(n, y, x, c); });
  else
    return {kept[0], kept[args.N * args.H * args.W]};
}

}  // namespace bcmf::device
