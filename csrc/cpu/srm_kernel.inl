// The CPU kernels of bcmf::srm. Each isa_<name>.cpp sets the target, defines BCMF_ISA, and includes this file. What is
// found once for a pixel is found for neighbours of a row in vectors; what is found for each of its channels, in
// vectors of channels.

#include "common/srm.h"
#include "cpu/entries.h"
#include "cpu/srm_kernel.h"

namespace bcmf::cpu {
namespace BCMF_ISA {
namespace srm {

constexpr int64_t kPixels = 64;  // of a row, which are worked on together

// Calls f(pointer) with a pointer of the entries' own type.
template <typename Acc, typename F>
BCMF_INLINE void with_type(const void* data, FloatType type, F f) {
  with_entries<Acc>(MapView{const_cast<void*>(data), type, 0, 0, 0, 0}, 0, f);
}

// Pixels x..x+count-1 of a row of the batch.
struct Pixels {
  int64_t n, y, row, x, count;
};

// Calls f(pixels) for all pixels of the rows begin..end of the batch, kPixels at most at a time.
template <typename F>
BCMF_INLINE void for_pixels(const SrmArgs& args, int64_t begin, int64_t end, F f) {
  for (int64_t row = begin; row < end; ++row)
    for (int64_t x = 0; x < args.W; x += kPixels)
      f(Pixels{row / args.H, row % args.H, row, x, args.W - x < kPixels ? args.W - x : kPixels});
}

// The offsets of pixels. Entries beyond the last pixel, to a whole vector, may be anything.
template <typename Acc>
struct Offsets {
  Acc given[3][kOffsets][kPixels + 2];  // of the rows above, here and below, from the column before the pixels on
  Acc weights[kNeighbours][kPixels];    // of the neighbours' offsets
  Acc mixed[kOffsets][kPixels];

  // The offset that neighbour q has of the pixels from i on.
  Vector<Acc> of_neighbour(int64_t q, int axis, int64_t i) const { return load_vector(given[q / 3][axis] + q % 3 + i); }
};

template <typename Acc>
static void mix_offsets(const SrmArgs& args, const Pixels& pixels, Offsets<Acc>& to) {
  with_type<Acc>(args.raw, args.raw_type, [&](const auto* raw) {
    for (int64_t u = 0; u < 3; ++u) {
      const auto* from = raw + (pixels.n * args.H + clamp(pixels.y + u - 1, args.H)) * args.W * kRaw;
      for (int64_t i = 0; i < pixels.count + 2; ++i)
        for (int axis = 0; axis < kOffsets; ++axis)
          to.given[u][axis][i] = widen(from[clamp(pixels.x + i - 1, args.W) * kRaw + axis]);
    }
    const auto* own = raw + (pixels.row * args.W + pixels.x) * kRaw + kOffsets;
    for (int64_t i = 0; i < pixels.count; ++i)
      for (int64_t q = 0; q < kNeighbours; ++q) to.weights[q][i] = widen(own[i * kRaw + q]);
  });
  for (int64_t i = 0; i < pixels.count; i += kWidth<Acc>) {
    Vector<Acc> largest = load_vector(to.weights[0] + i), sum = {}, x = {}, y = {}, exps[kNeighbours];
    for (int64_t q = 1; q < kNeighbours; ++q) {
      const Vector<Acc> logit = load_vector(to.weights[q] + i);
      largest = logit > largest ? logit : largest;
    }
    for (int64_t q = 0; q < kNeighbours; ++q) {
      exps[q] = exp_nonpositive(load_vector(to.weights[q] + i) - largest);
      sum += exps[q];
    }
    for (int64_t q = 0; q < kNeighbours; ++q) {
      const Vector<Acc> weight = exps[q] / sum;
      x += weight * to.of_neighbour(q, 0, i), y += weight * to.of_neighbour(q, 1, i);
      store_vector(weight, to.weights[q] + i);
    }
    store_vector(x, to.mixed[0] + i), store_vector(y, to.mixed[1] + i);
  }
}

// What a pixel reads along an axis, at its place plus an offset.
template <typename Acc>
BCMF_INLINE WarpTaps<Acc> taps_at(const AxisTable<Acc>& axis, Acc position, int64_t length) {
  const WarpPosition<Acc> at = warp_position(position, static_cast<int>(length));
  const int next = at.before + 1 < length ? at.before + 1 : at.before;
  return warp_taps(at, axis.first[at.before], axis.weight[at.before], axis.first[next], axis.weight[next]);
}

// The entries of the low map that a pixel reads, as offsets in an image's map, and how much of them.
template <typename Acc>
struct Reads {
  int count = 0;
  int64_t offset[9];
  Acc weight[9];

  void add(int64_t at, Acc w) { offset[count] = at, weight[count++] = w; }
};
// Those with a weight. (What is read with a weight of 0 might be infinite.)
template <typename Acc>
BCMF_INLINE Reads<Acc> reads_of(const SrmArgs& args, const WarpTaps<Acc>& x, const WarpTaps<Acc>& y) {
  Reads<Acc> reads;
  for (int a = 0; a < y.count; ++a)
    for (int b = 0; b < x.count; ++b) {
      const Acc weight = y.weight[a] * x.weight[b];
      if (weight != 0) reads.add(((y.first + a) * args.w + x.first + b) * args.C, weight);
    }
  return reads;
}

// Neighbouring channels of a pixel: whole vectors of them, or one that may not be full.
template <typename Acc, int kVectors_>
struct Channels {
  static constexpr int kVectors = kVectors_;
  int64_t first, count;

  template <typename Scalar>
  Vector<Acc> load(const Scalar* pixel, int k) const {
    const Scalar* from = pixel + first + k * kWidth<Acc>;
    return kVectors > 1 ? load_full(from) : load_widened<Acc>(from, count);
  }
  template <typename Scalar>
  void store(Vector<Acc> value, Scalar* pixel, int k) const {
    Scalar* to = pixel + first + k * kWidth<Acc>;
    kVectors > 1 ? store_full(value, to) : store_narrowed<Acc>(value, to, count);
  }
};
// Calls f(channels) for the channels begin..end.
template <typename Acc, typename F>
BCMF_INLINE void for_channels(int64_t begin, int64_t end, F f) {
  constexpr int kMost = 4;  // vectors, which stay in registers
  int64_t c = begin;
  for (; c + kMost * kWidth<Acc> <= end; c += kMost * kWidth<Acc>) f(Channels<Acc, kMost>{c, kMost * kWidth<Acc>});
  for (; c < end; c += kWidth<Acc>) f(Channels<Acc, 1>{c, end - c < kWidth<Acc> ? end - c : kWidth<Acc>});
}

template <typename Acc>
static void forward(const SrmArgs& args, const SrmWork<Acc>& work, int64_t begin, int64_t end) {
  with_type<Acc>(args.low, args.type, [&](const auto* low) {
    using Scalar = std::remove_cv_t<std::remove_pointer_t<decltype(low)>>;
    Offsets<Acc> offsets;
    for_pixels(args, begin, end, [&](const Pixels& pixels) {
      mix_offsets(args, pixels, offsets);
      const Scalar* image = low + pixels.n * args.h * args.w * args.C;
      for (int64_t i = 0; i < pixels.count; ++i) {
        const Reads<Acc> reads = reads_of(args, taps_at(work.across, pixels.x + i + offsets.mixed[0][i], args.W),
                                          taps_at(work.down, pixels.y + offsets.mixed[1][i], args.H));
        const int64_t pixel = (pixels.row * args.W + pixels.x + i) * args.C;
        const Scalar* residual = static_cast<const Scalar*>(args.residual) + pixel;
        Scalar* out = static_cast<Scalar*>(args.out) + pixel;
        for_channels<Acc>(0, args.C, [&](auto channels) {
          Vector<Acc> sum[channels.kVectors];
          for (int k = 0; k < channels.kVectors; ++k) sum[k] = channels.load(residual, k);
          for (int t = 0; t < reads.count; ++t)
            for (int k = 0; k < channels.kVectors; ++k)
              sum[k] += reads.weight[t] * channels.load(image + reads.offset[t], k);
          for (int k = 0; k < channels.kVectors; ++k) channels.store(sum[k], out, k);
        });
      }
    });
  });
}

// Adds up, for each pixel, how the total changes with its position.
template <typename Acc, typename Scalar>
static void find_pull(const SrmArgs& args, const WarpTaps<Acc>& x, const WarpTaps<Acc>& y, const Scalar* image,
                      const Scalar* grad, Acc& pull_x, Acc& pull_y) {
  Vector<Acc> by_x = {}, by_y = {};
  for_channels<Acc>(0, args.C, [&](auto channels) {
    Vector<Acc> upstream[channels.kVectors];
    for (int k = 0; k < channels.kVectors; ++k) upstream[k] = channels.load(grad, k);
    for (int a = 0; a < y.count; ++a)
      for (int b = 0; b < x.count; ++b) {
        const Acc of_x = y.weight[a] * x.slope[b], of_y = y.slope[a] * x.weight[b];
        if (of_x == 0 && of_y == 0) continue;
        const Scalar* entry = image + ((y.first + a) * args.w + x.first + b) * args.C;
        Vector<Acc> product = {};
        for (int k = 0; k < channels.kVectors; ++k) product += upstream[k] * channels.load(entry, k);
        by_x += of_x * product, by_y += of_y * product;
      }
  });
  pull_x = add_lanes<Acc>(by_x), pull_y = add_lanes<Acc>(by_y);
}

// Writes the gradients of the neighbours' logits.
template <typename Acc>
static void store_logit_gradients(const SrmArgs& args, const Pixels& pixels, const Offsets<Acc>& offsets,
                                  const Acc (&pulls)[kOffsets][kPixels]) {
  Acc gradients[kNeighbours][kPixels];
  for (int64_t i = 0; i < pixels.count; i += kWidth<Acc>) {
    const Vector<Acc> x = load_vector(pulls[0] + i), y = load_vector(pulls[1] + i);
    const Vector<Acc> mean = x * load_vector(offsets.mixed[0] + i) + y * load_vector(offsets.mixed[1] + i);
    for (int64_t q = 0; q < kNeighbours; ++q) {
      const Vector<Acc> own = x * offsets.of_neighbour(q, 0, i) + y * offsets.of_neighbour(q, 1, i);
      store_vector(load_vector(offsets.weights[q] + i) * (own - mean), gradients[q] + i);
    }
  }
  with_type<Acc>(args.grad_raw, args.raw_type, [&](auto* grad_raw) {
    auto* to = grad_raw + (pixels.row * args.W + pixels.x) * kRaw + kOffsets;
    for (int64_t i = 0; i < pixels.count; ++i, to += kRaw)
      for (int64_t q = 0; q < kNeighbours; ++q) narrow(gradients[q][i], to + q);
  });
}

template <typename Acc>
static void find_pulls(const SrmArgs& args, const SrmWork<Acc>& work, int64_t begin, int64_t end) {
  with_type<Acc>(args.low, args.type, [&](const auto* low) {
    using Scalar = std::remove_cv_t<std::remove_pointer_t<decltype(low)>>;
    Offsets<Acc> offsets;
    for_pixels(args, begin, end, [&](const Pixels& pixels) {
      mix_offsets(args, pixels, offsets);
      const Scalar* image = low + pixels.n * args.h * args.w * args.C;
      Acc pulls[kOffsets][kPixels];
      for (int64_t i = 0; i < pixels.count; ++i) {
        const Acc x = pixels.x + i + offsets.mixed[0][i], y = pixels.y + offsets.mixed[1][i];
        const Scalar* grad = static_cast<const Scalar*>(args.out) + (pixels.row * args.W + pixels.x + i) * args.C;
        find_pull(args, taps_at(work.across, x, args.W), taps_at(work.down, y, args.H), image, grad, pulls[0][i],
                  pulls[1][i]);
        Acc* position = work.positions + pixels.row * kOffsets * args.W + pixels.x + i;
        position[0] = x, position[args.W] = y;
      }
      for (int axis = 0; axis < kOffsets; ++axis)
        for (int64_t i = 0; i < pixels.count; ++i)
          work.pulls[(pixels.row * kOffsets + axis) * args.W + pixels.x + i] = pulls[axis][i];
      for (int64_t q = 0; q < kNeighbours; ++q)
        for (int64_t i = 0; i < pixels.count; ++i)
          work.weights[(pixels.row * kNeighbours + q) * args.W + pixels.x + i] = offsets.weights[q][i];
      store_logit_gradients(args, pixels, offsets, pulls);
    });
  });
}

// Adds up what the pixels of a row of the batch pull at the offsets of the row that is `down` rows away, which has room
// for a column more on both sides.
template <typename Acc>
static void add_pulls(const SrmArgs& args, const SrmWork<Acc>& work, int64_t row, int64_t down,
                      Acc* const (&sums)[kOffsets]) {
  for (int64_t u = 0; u < 3; ++u) {
    const Acc* weight = work.weights + (row * kNeighbours + 3 * (down + 1) + u) * args.W;
    for (int axis = 0; axis < kOffsets; ++axis) {
      const Acc* pull = work.pulls + (row * kOffsets + axis) * args.W;
      for (int64_t x = 0; x < args.W; ++x) sums[axis][x + u] += weight[x] * pull[x];
    }
  }
}

template <typename Acc>
static void gather_offsets(const SrmArgs& args, const SrmWork<Acc>& work, int64_t begin, int64_t end, Acc* scratch) {
  const int64_t width = args.W + 2;
  Acc* const sums[kOffsets] = {scratch, scratch + width};
  for (int64_t row = begin; row < end; ++row) {
    const int64_t y = row % args.H;
    for (int64_t i = 0; i < kOffsets * width; ++i) scratch[i] = 0;
    for (int64_t down = -1; down <= 1; ++down) {
      if (y - down >= 0 && y - down < args.H) add_pulls(args, work, row - down, down, sums);
      // A row at the border also stands for the one beyond it.
      if (y + down < 0 || y + down >= args.H) add_pulls(args, work, row, down, sums);
    }
    with_type<Acc>(args.grad_raw, args.raw_type, [&](auto* grad_raw) {
      auto* to = grad_raw + row * args.W * kRaw;
      for (int axis = 0; axis < kOffsets; ++axis) {
        Acc* sum = sums[axis] + 1;
        sum[0] += sum[-1], sum[args.W - 1] += sum[args.W];
        for (int64_t x = 0; x < args.W; ++x) narrow(sum[x], to + x * kRaw + axis);
      }
    });
  }
}

template <typename Acc>
static void add_low(const SrmArgs& args, const SrmWork<Acc>& work, int64_t n, int64_t begin, int64_t end) {
  with_type<Acc>(args.out, args.type, [&](const auto* grads) {
    using Scalar = std::remove_cv_t<std::remove_pointer_t<decltype(grads)>>;
    Acc* image = work.sums + n * args.h * args.w * args.C;
    for (int64_t entry = 0; entry < args.h * args.w; ++entry)
      for (int64_t c = begin; c < end; ++c) image[entry * args.C + c] = 0;
    for (int64_t row = n * args.H; row < (n + 1) * args.H; ++row) {
      const Acc* positions = work.positions + row * kOffsets * args.W;
      for (int64_t x = 0; x < args.W; ++x) {
        const Reads<Acc> reads = reads_of(args, taps_at(work.across, positions[x], args.W),
                                          taps_at(work.down, positions[args.W + x], args.H));
        const Scalar* grad = grads + (row * args.W + x) * args.C;
        for_channels<Acc>(begin, end, [&](auto channels) {
          Vector<Acc> upstream[channels.kVectors];
          for (int k = 0; k < channels.kVectors; ++k) upstream[k] = channels.load(grad, k);
          for (int t = 0; t < reads.count; ++t) {
            Acc* sum = image + reads.offset[t];
            for (int k = 0; k < channels.kVectors; ++k)
              channels.store(channels.load(sum, k) + reads.weight[t] * upstream[k], sum, k);
          }
        });
      }
    }
    if constexpr (!std::is_same_v<Scalar, Acc>) {
      Scalar* to = static_cast<Scalar*>(args.grad_low) + n * args.h * args.w * args.C;
      for (int64_t entry = 0; entry < args.h * args.w; ++entry, image += args.C, to += args.C)
        for_channels<Acc>(begin, end, [&](auto channels) {
          for (int k = 0; k < channels.kVectors; ++k) channels.store(channels.load(image, k), to, k);
        });
    }
  });
}

template <typename Acc>
constexpr SrmKernels<Acc> kernels = {forward<Acc>, find_pulls<Acc>, gather_offsets<Acc>, add_low<Acc>};

}  // namespace srm
}  // namespace BCMF_ISA
}  // namespace bcmf::cpu
