// Included by loss_<isa>.cpp, each of which sets the target and defines BCMF_ISA. Plain loops over the pixels of a
// tile, which the compiler vectorises; nothing from torch or the standard library that the linker could merge across
// instruction sets.

#include "../device/select.cuh"
#include "loss_kernel.h"
#include "math.h"

namespace bcmf::cpu {
namespace BCMF_ISA {

// Calls f(y, x, i, length) for the row segments of the pixels first..first+count of an image; i counts from 0. Rows
// that follow each other without a gap count as one.
template <typename F>
BCMF_INLINE void for_segments(const LossArgs& args, const LogitView& view, int64_t first, int64_t count, F f) {
  if (view.stride_h == args.W * view.stride_w) return f(int64_t{0}, first, int64_t{0}, count);
  for (int64_t i = 0; i < count;) {
    const int64_t y = (first + i) / args.W, x = (first + i) % args.W;
    const int64_t length = args.W - x < count - i ? args.W - x : count - i;
    f(y, x, i, length);
    i += length;
  }
}

// Logits of a tile to z, (C, pitch) acc: pixels are contiguous there whatever the strides of the tensor.
template <typename Scalar, typename Acc>
static void load_as(const LossArgs& args, int64_t n, int64_t first, int64_t count, Acc* __restrict z, int64_t pitch) {
  const LogitView& v = args.logits;
  const Scalar* image = static_cast<const Scalar*>(v.data) + n * v.stride_n;
  for_segments(args, v, first, count, [&](int64_t y, int64_t x, int64_t i, int64_t length) {
    const Scalar* from = image + y * v.stride_h + x * v.stride_w;
    if (v.stride_w == 1) {
      for (int64_t c = 0; c < args.C; ++c)
        for (int64_t k = 0; k < length; ++k) z[c * pitch + i + k] = widen(from[c * v.stride_c + k]);
    } else {
      for (int64_t k = 0; k < length; ++k)
        for (int64_t c = 0; c < args.C; ++c) z[c * pitch + i + k] = widen(from[k * v.stride_w + c * v.stride_c]);
    }
  });
}

template <typename Scalar, typename Acc>
static void store_as(const LossArgs& args, int64_t n, int64_t first, int64_t count, const Acc* __restrict z,
                     int64_t pitch) {
  const LogitView& v = args.grad;
  Scalar* image = static_cast<Scalar*>(v.data) + n * v.stride_n;
  for_segments(args, v, first, count, [&](int64_t y, int64_t x, int64_t i, int64_t length) {
    Scalar* to = image + y * v.stride_h + x * v.stride_w;
    if (v.stride_w == 1) {
      for (int64_t c = 0; c < args.C; ++c)
        for (int64_t k = 0; k < length; ++k) narrow(z[c * pitch + i + k], to + c * v.stride_c + k);
    } else {
      for (int64_t k = 0; k < length; ++k)
        for (int64_t c = 0; c < args.C; ++c) narrow(z[c * pitch + i + k], to + k * v.stride_w + c * v.stride_c);
    }
  });
}

static void load(const LossArgs& args, int64_t n, int64_t first, int64_t count, float* z, int64_t pitch) {
  if (args.logits.type == LogitType::f16) return load_as<F16>(args, n, first, count, z, pitch);
  if (args.logits.type == LogitType::bf16) return load_as<BF16>(args, n, first, count, z, pitch);
  load_as<float>(args, n, first, count, z, pitch);
}
static void load(const LossArgs& args, int64_t n, int64_t first, int64_t count, double* z, int64_t pitch) {
  load_as<double>(args, n, first, count, z, pitch);
}
static void store(const LossArgs& args, int64_t n, int64_t first, int64_t count, const float* z, int64_t pitch) {
  if (args.grad.type == LogitType::f16) return store_as<F16>(args, n, first, count, z, pitch);
  if (args.grad.type == LogitType::bf16) return store_as<BF16>(args, n, first, count, z, pitch);
  store_as<float>(args, n, first, count, z, pitch);
}
static void store(const LossArgs& args, int64_t n, int64_t first, int64_t count, const double* z, int64_t pitch) {
  store_as<double>(args, n, first, count, z, pitch);
}

static void load_labels(const LossArgs& args, int64_t n, int64_t first, int64_t count, int* labels) {
  int64_t y = first / args.W, x = first % args.W;
  for (int64_t i = 0; i < count; ++i) {
    labels[i] = read_label(args, n, y, x);
    if (++x == args.W) x = 0, ++y;
  }
}

// Of each pixel: the maximum m of its logits, and log sum_c exp(z_c - m).
template <typename Acc>
static void log_sum_exp(const LossArgs& args, const Acc* __restrict z, int64_t pitch, int64_t count, Acc* __restrict m,
                        Acc* __restrict log_sum) {
  for (int64_t i = 0; i < count; ++i) m[i] = z[i];
  for (int64_t c = 1; c < args.C; ++c)
    for (int64_t i = 0; i < count; ++i) m[i] = z[c * pitch + i] > m[i] ? z[c * pitch + i] : m[i];
  Acc sum[kMaxTilePixels];
  for (int64_t i = 0; i < count; ++i) sum[i] = 0;
  for (int64_t c = 0; c < args.C; ++c)
    for (int64_t i = 0; i < count; ++i) sum[i] += exp_nonpositive(z[c * pitch + i] - m[i]);
  for (int64_t i = 0; i < count; ++i) log_sum[i] = log_positive(sum[i]);
}

template <typename Acc>
static void forward(const LossArgs& args, int64_t begin, int64_t end, void* scratch, LossPartial* partials) {
  const int64_t pixels = args.H * args.W, pitch = tile_pixels(args), per_image = tiles_per_image(args);
  const Acc* weight = static_cast<const Acc*>(args.weight);
  const auto hard = key_of(static_cast<Acc>(args.ohem_cutoff));
  Acc* z = static_cast<Acc*>(scratch);
  int labels[kMaxTilePixels];
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t n = tile / per_image, first = tile % per_image * pitch;
    const int64_t count = pixels - first < pitch ? pixels - first : pitch;
    Acc* m = static_cast<Acc*>(args.stats) + n * pixels + first;
    Acc* log_sum = m + args.N * pixels;
    load(args, n, first, count, z, pitch);
    load_labels(args, n, first, count, labels);
    log_sum_exp(args, z, pitch, count, m, log_sum);

    LossPartial partial = {};
    Acc* nlls = args.ohem ? static_cast<Acc*>(args.nll) + n * pixels + first : nullptr;
    for (int64_t i = 0; i < count; ++i) {
      Acc nll = -1;  // ignored
      if (labels[i] >= 0) {
        nll = (m[i] - z[labels[i] * pitch + i]) + log_sum[i];
        const Acc w = weight ? weight[labels[i]] : 1;
        partial.weighted_nll += w * nll;
        partial.weight += w;
        partial.hard += key_of(nll) >= hard;
        partial.valid += 1;
      } else {
        partial.bad_labels += labels[i] == kBad;
      }
      if (nlls) nlls[i] = nll;
    }
    partials[tile] = partial;
  }
}

template <typename Acc>
static void backward(const LossArgs& args, int64_t begin, int64_t end, void* scratch) {
  const int64_t pixels = args.H * args.W, pitch = tile_pixels(args), per_image = tiles_per_image(args);
  const Acc* weight = static_cast<const Acc*>(args.weight);
  const Acc* summary = static_cast<const Acc*>(args.summary);
  const Acc denominator = summary[kDenominator];
  const auto cutoff = key_of(summary[kCutoff]);
  const Acc scale = denominator != 0 ? *static_cast<const Acc*>(args.grad_total) / denominator : 0;
  Acc* z = static_cast<Acc*>(scratch);
  int labels[kMaxTilePixels];
  Acc coefficient[kMaxTilePixels];  // of the pixel's softmax gradient; exactly 0 where ignored
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t n = tile / per_image, first = tile % per_image * pitch;
    const int64_t count = pixels - first < pitch ? pixels - first : pitch;
    const Acc* m = static_cast<const Acc*>(args.stats) + n * pixels + first;
    const Acc* log_sum = m + args.N * pixels;
    load(args, n, first, count, z, pitch);
    load_labels(args, n, first, count, labels);
    for (int64_t i = 0; i < count; ++i) {
      const Acc w = labels[i] < 0 ? 0 : weight ? weight[labels[i]] : 1;
      coefficient[i] = labels[i] == kBad ? static_cast<Acc>(__builtin_nan("")) : scale * w;
    }
    if (args.ohem) {  // the forward's own arithmetic, so that the same pixels are kept
      for (int64_t i = 0; i < count; ++i)
        if (labels[i] >= 0 && key_of((m[i] - z[labels[i] * pitch + i]) + log_sum[i]) < cutoff) coefficient[i] = 0;
    }
    for (int64_t c = 0; c < args.C; ++c)
      for (int64_t i = 0; i < count; ++i) {
        const Acc p = exp_nonpositive((z[c * pitch + i] - m[i]) - log_sum[i]);
        z[c * pitch + i] = coefficient[i] != 0 ? coefficient[i] * p : 0;  // 0 * NaN of an ignored pixel is 0 here
      }
    for (int64_t i = 0; i < count; ++i)
      if (labels[i] >= 0) z[labels[i] * pitch + i] -= coefficient[i];
    store(args, n, first, count, z, pitch);
  }
}

static void forward_any(const LossArgs& args, int64_t begin, int64_t end, void* scratch, LossPartial* partials) {
  if (args.logits.type == LogitType::f64) return forward<double>(args, begin, end, scratch, partials);
  forward<float>(args, begin, end, scratch, partials);
}
static void backward_any(const LossArgs& args, int64_t begin, int64_t end, void* scratch) {
  if (args.logits.type == LogitType::f64) return backward<double>(args, begin, end, scratch);
  backward<float>(args, begin, end, scratch);
}

}  // namespace BCMF_ISA
}  // namespace bcmf::cpu
