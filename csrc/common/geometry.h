// The index arithmetic of all kernels, which is exact because it is done in integers: which label a flip brings,
// between which logits a label pixel lies, and the Sobel taps. docs/definitions.md says what it computes.
#pragma once

#include "common/args.h"

namespace bcmf {

#if defined(__CUDACC__)
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double rounded_product(double a, double b) { return __dmul_rn(a, b); }
#endif

// Brings an index beyond the border to the pixel that the replicated border copies.
template <typename Index>
BCMF_HOST_DEVICE Index clamp(Index i, Index length) {
  return i < 0 ? 0 : i < length ? i : length - 1;
}

// pi_s of BCL swaps neighbouring groups of `step` indices; an index whose partner would lie outside stays.
template <typename Index>
BCMF_HOST_DEVICE Index flip_index(Index i, Index step, Index length) {
  const Index partner = i / step % 2 == 0 ? i + step : i - step;
  return partner < length ? partner : i;
}

// Bilinear resampling along an axis: pixel i of `out` is mix(in[first], in[second], weight).
template <typename Acc>
struct AxisTap {
  int64_t first, second;
  Acc weight;
};

// The position in `in` is a fraction of integers, because floating point would pick another `first` where it is almost
// an integer.
template <typename Acc>
BCMF_HOST_DEVICE AxisTap<Acc> axis_tap(int64_t i, int64_t in, int64_t out, bool align_corners) {
  int64_t numerator, denominator;
  if (align_corners) {
    numerator = i * (in - 1);
    denominator = out > 1 ? out - 1 : 1;
  } else {
    numerator = (2 * i + 1) * in - out;
    denominator = 2 * out;
    numerator = numerator > 0 ? numerator : 0;
  }
  const int64_t first = numerator / denominator;
  if (first + 1 >= in) return {first, first, Acc(0)};  // an exact copy beyond the last centre: ties stay ties
  // Small GPUs have few units for double, and a float weight is exact to its last bit but one without them.
  return {first, first + 1, static_cast<Acc>(numerator % denominator) / static_cast<Acc>(denominator)};
}

// Returns the first pixel of `out` whose AxisTap::first is `cell` or a later one: the inverse of axis_tap.
BCMF_HOST_DEVICE int64_t axis_start(int64_t cell, int64_t in, int64_t out, bool align_corners) {
  if (cell <= 0) return 0;
  if (cell >= in) return out;
  // The least i with a fraction of at least `cell`; in >= 2 here.
  const int64_t numerator = align_corners ? cell * (out - 1) : 2 * cell * out + out - in;
  const int64_t denominator = align_corners ? in - 1 : 2 * in;
  if (out == 1 && align_corners) return out;
  const int64_t start = numerator > 0 ? (numerator + denominator - 1) / denominator : 0;
  return start < out ? start : out;
}

// The value at `weight` between a and b. Both products are formed, as F.interpolate does, so that infinities come out
// alike; but b is not read into the value where its weight is 0. A compiler for GPUs may fuse either product with the
// sum, and another one at another place; it is told here which one, so that a logit has the same bits wherever it is
// computed.
template <typename Acc>
BCMF_HOST_DEVICE Acc mix(Acc a, Acc b, Acc weight) {
#if defined(__CUDA_ARCH__)
  return weight == 0 ? a : fma(weight, b, rounded_product(1 - weight, a));
#else
  return weight == 0 ? a : (1 - weight) * a + weight * b;
#endif
}

// The same bits, but for the sign of a zero, for finite a and b; rest is 1 - weight.
template <typename Acc>
BCMF_HOST_DEVICE Acc mix_finite(Acc a, Acc b, Acc rest, Acc weight) {
#if defined(__CUDA_ARCH__)
  return fma(weight, b, rounded_product(rest, a));
#else
  return rest * a + weight * b;
#endif
}

// Taps of CPG's Sobel kernels times this denominator are integers, so that G != 0 is decided exactly.
BCMF_HOST_DEVICE constexpr int sobel_denominator(int radius) { return radius == 1 ? 2 : radius == 2 ? 20 : 780; }

// K_x[u, v] is sobel_tap(radius, v, u), K_y[u, v] is sobel_tap(radius, u, v); u is the row offset. 0 at the centre.
BCMF_HOST_DEVICE constexpr int sobel_tap(int radius, int along, int across) {
  const int squared = along * along + across * across;
  return squared == 0 ? 0 : sobel_denominator(radius) * along / squared;
}

}  // namespace bcmf
