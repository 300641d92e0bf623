// What the kernels of bcmf::srm have in common: arguments, and how a position reads the map. docs/definitions.md (SRM)
// says what they compute.
//
// All maps are in channels_last without gaps: an entry is at ((n * rows + y) * columns + x) * channels + c.
#pragma once

#include "common/geometry.h"

namespace bcmf {

constexpr int kOffsets = 2;                   // of `raw`: x and y, in pixels
constexpr int kNeighbours = 9;                // of a pixel, row by row; of `raw`: a logit for each of their offsets
constexpr int kRaw = kOffsets + kNeighbours;  // channels

// `acc` is float, or double for fp64 maps.
struct SrmArgs {
  int64_t N, C, h, w, H, W;   // H >= h, W >= w
  FloatType type, raw_type;   // of the maps; of `raw` and its gradient, which may be acc instead
  const void *low, *raw;      // (N, C, h, w), (N, kRaw, H, W)
  const void* residual;       // (N, C, H, W), forward only
  void* out;                  // (N, C, H, W); in the backward its gradient, which is read
  void *grad_low, *grad_raw;  // backward only
};

// Where a position lies on an axis of the upsampled map: between pixels `before` and the next one.
template <typename Acc>
struct WarpPosition {
  int before;
  Acc fraction;  // NaN if the position is
  bool inside;   // of the map: there a change of the position changes what is read
};
template <typename Acc>
BCMF_HOST_DEVICE WarpPosition<Acc> warp_position(Acc x, int length) {
  const Acc last = static_cast<Acc>(length - 1), clamped = x <= 0 ? Acc(0) : x >= last ? last : x;
  int before = clamped == clamped ? static_cast<int>(clamped) : 0;
  if (before > length - 2) before = length > 1 ? length - 2 : 0;
  return {before, clamped - static_cast<Acc>(before), x > 0 && x < last};
}

// How much of the entries first..first+count-1 of an axis of the map is read at a position of the upsampled one, and
// how that changes with the position.
template <typename Acc>
struct WarpTaps {
  static constexpr int kMost = 3;
  int first, count;
  Acc weight[kMost], slope[kMost];
};
// lower and upper: between which entries `before` and the next pixel of the upsampled map lie.
template <typename Acc>
BCMF_HOST_DEVICE WarpTaps<Acc> warp_taps(const WarpPosition<Acc>& at, int lower, Acc lower_weight, int upper,
                                         Acc upper_weight) {
  const Acc t = at.fraction, rest = 1 - t, on = at.inside ? Acc(1) : Acc(0);
  const Acc a = rest * lower_weight, b = t * upper_weight, c = rest - a, d = t - b;
  if (lower == upper) {
    const Acc slope = on * (upper_weight - lower_weight);
    return {lower, lower_weight != 0 || upper_weight != 0 ? 2 : 1, {c + d, a + b, 0}, {-slope, slope, 0}};
  }
  return {lower,
          upper_weight != 0 ? 3 : 2,
          {c, a + d, b},
          {on * (lower_weight - 1), on * (1 - upper_weight - lower_weight), on * upper_weight}};
}

}  // namespace bcmf
