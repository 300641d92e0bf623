// Included by loss_<isa>.cpp, each of which sets the target and defines BCMF_ISA. Plain loops over the pixels of a
// tile, which the compiler vectorises; nothing from torch or the standard library that the linker could merge across
// instruction sets.

#include "../device/geometry.cuh"
#include "../device/select.cuh"
#include "loss_kernel.h"
#include "math.h"

namespace bcmf::cpu {
namespace BCMF_ISA {

// The compiler would rather take a short loop of known length apart, into single operations, than vectorise it.
#if defined(__clang__)
#define BCMF_LANES
#else
#define BCMF_LANES _Pragma("GCC unroll 1")
#endif

// Label pixels that are worked on together: whole rows if there are several.
struct Tile {
  int64_t y, rows, xa, xb;
  int64_t count() const { return rows * (xb - xa); }
};

#include "logits.inl"
// These use it.
#include "bcl.inl"
#include "cpg.inl"

// Calls f(n, block, tile, first, last) for the tiles of blocks begin..end of the batch; first and last: of a strip of
// columns of the block.
template <typename Acc, typename F>
BCMF_INLINE void for_tiles(const LossArgs& args, const LossWork<Acc>& work, int64_t begin, int64_t end, F f) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t n = block / work.blocks, bottom = work.row[block % work.blocks + 1];
    const int64_t top = work.row[block % work.blocks];
    for (int64_t xa = 0; xa < args.W; xa += work.strip) {
      const int64_t xb = args.W - xa < work.strip ? args.W : xa + work.strip;
      for (int64_t y = top; y < bottom; y += work.rows_per_tile) {
        const int64_t rows = bottom - y < work.rows_per_tile ? bottom - y : work.rows_per_tile;
        f(n, block, Tile{y, rows, xa, xb}, y == top, y + rows == bottom);
      }
    }
  }
}

// Sums that vectorise: pixel i goes into lane i % kLanes, and the lanes are added up in order.
constexpr int64_t kLanes = 16;
template <typename T>
struct LaneSums {
  T lane[kLanes] = {};
  T total() const {
    T sum = 0;
    for (int64_t i = 0; i < kLanes; ++i) sum += lane[i];
    return sum;
  }
};
template <typename F>
BCMF_INLINE void for_lanes(int64_t count, F f) {  // f(i, lane)
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    BCMF_LANES
    for (int64_t lane = 0; lane < kLanes; ++lane) f(i + lane, lane);
  }
  for (int64_t lane = 0; i < count; ++i, ++lane) f(i, lane);
}

template <typename Label>
static void load_labels_as(const LossArgs& args, int64_t n, Tile t, int* __restrict labels) {
  const LabelView& v = args.labels;
  for (int64_t y = t.y; y < t.y + t.rows; ++y, labels += t.xb - t.xa) {
    const Label* row = static_cast<const Label*>(v.data) + n * v.stride_n + y * v.stride_h + t.xa * v.stride_w;
    if (v.stride_w == 1)
      for (int64_t i = 0; i < t.xb - t.xa; ++i) labels[i] = classify_label(row[i], args.C, args.ignore_index);
    else
      for (int64_t i = 0; i < t.xb - t.xa; ++i)
        labels[i] = classify_label(row[i * v.stride_w], args.C, args.ignore_index);
  }
}

static void load_labels(const LossArgs& args, int64_t n, Tile t, int* labels) {
  switch (args.labels.type) {
    case LabelType::u8:
      return load_labels_as<uint8_t>(args, n, t, labels);
    case LabelType::i16:
      return load_labels_as<int16_t>(args, n, t, labels);
    case LabelType::i32:
      return load_labels_as<int32_t>(args, n, t, labels);
    case LabelType::i64:
      return load_labels_as<int64_t>(args, n, t, labels);
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

template <typename Acc, typename Source>
static void forward_from(const LossArgs& args, const LossWork<Acc>& work, int64_t begin, int64_t end, Acc* scratch,
                         LossPartial* partials) {
  const Acc* weight = static_cast<const Acc*>(args.weight);
  const auto hard = key_of(static_cast<Acc>(args.ohem_cutoff));
  Acc* z = scratch;
  Source source(args, work, scratch + args.C * work.pitch);
  int labels[kMaxTilePixels];
  for_tiles(args, work, begin, end, [&](int64_t n, int64_t block, Tile t, bool first, bool) {
    if (first) source.begin(n, t);
    const int64_t pixel = (n * args.H + t.y) * args.W + t.xa, count = t.count();
    Acc* m = static_cast<Acc*>(args.stats) + pixel;
    Acc* log_sum = m + args.N * args.H * args.W;
    source.load(n, t, z);
    load_labels(args, n, t, labels);
    log_sum_exp(args, z, work.pitch, count, m, log_sum);

    Acc nll[kMaxTilePixels];  // -1 where ignored
    for (int64_t i = 0; i < count; ++i)
      nll[i] = labels[i] >= 0 ? (m[i] - z[(labels[i] < 0 ? 0 : labels[i]) * work.pitch + i]) + log_sum[i] : Acc(-1);
    if (work.nll)
      for (int64_t i = 0; i < count; ++i) work.nll[pixel + i] = nll[i];
    for (int s = 0; s < args.bcl_steps; ++s) score_tile(args, work, s, n, t, z, nll, m, log_sum);

    LaneSums<double> weighted_nll, weights;
    LaneSums<int32_t> above, valid, bad;
    for_lanes(count, [&](int64_t i, int64_t lane) {
      const bool counts = labels[i] >= 0;
      const Acc w = !counts ? 0 : weight ? weight[labels[i]] : 1;
      weighted_nll.lane[lane] += counts ? w * nll[i] : 0;
      weights.lane[lane] += w;
      above.lane[lane] += counts && key_of(nll[i]) >= hard;
      valid.lane[lane] += counts;
      bad.lane[lane] += labels[i] == kBad;
    });
    LossPartial& partial = partials[block];
    partial.weighted_nll += weighted_nll.total();
    partial.weight += weights.total();
    partial.hard += above.total();
    partial.valid += valid.total();
    partial.bad_labels += bad.total();
  });
}

// What the cross-entropy and BCL ask of each pixel: `pull` of p towards the one-hot label, exactly 0 where nothing.
template <typename Acc>
static void find_pull(const LossArgs& args, const Acc* z, int64_t pitch, int64_t count, const int* labels, const Acc* m,
                      const Acc* log_sum, const uint8_t* selected, Acc* pull) {
  const Acc* weight = static_cast<const Acc*>(args.weight);
  const Acc* summary = static_cast<const Acc*>(args.summary);
  const Acc denominator = summary[kDenominator], upstream = *static_cast<const Acc*>(args.grad_total);
  const Acc scale = args.ce && denominator != 0 ? upstream / denominator : 0;
  for (int64_t i = 0; i < count; ++i) {
    const Acc w = labels[i] < 0 ? 0 : weight ? weight[labels[i]] : 1;
    pull[i] = labels[i] == kBad ? static_cast<Acc>(__builtin_nan("")) : scale * w;
  }
  if (args.ohem) {  // the forward's own arithmetic, so that the same pixels are kept
    const auto cutoff = key_of(summary[kCutoff]);
    for (int64_t i = 0; i < count; ++i) {
      const Acc nll = (m[i] - z[(labels[i] < 0 ? 0 : labels[i]) * pitch + i]) + log_sum[i];
      pull[i] = labels[i] >= 0 && key_of(nll) < cutoff ? 0 : pull[i];
    }
  }
  if (selected && !args.bcl_flipped) {
    for (int s = 0; s < args.bcl_steps; ++s) {
      const Acc share = bcl_scale<Acc>(args, summary[kSelected + s]);
      for (int64_t i = 0; i < count; ++i) pull[i] += selected[i] >> s & 1 ? share : 0;
    }
  }
}

template <typename Acc, typename Source>
static void backward_from(const LossArgs& args, const LossWork<Acc>& work, int64_t begin, int64_t end, Acc* scratch) {
  const int64_t tile = args.C * work.pitch, pixels = args.N * args.H * args.W;
  Acc* z = scratch;
  Source source(args, work, scratch + tile);
  SparseGradient<Acc> sparse(args, work, scratch + 5 * tile);
  int labels[kMaxTilePixels];
  Acc pull[kMaxTilePixels], factor[kMaxTilePixels];  // the gradient is factor * p - pull * onehot, and what is sparse
  for_tiles(args, work, begin, end, [&](int64_t n, int64_t block, Tile t, bool first, bool last) {
    if (first) {
      source.begin(n, t);
      source.clear_sums();
    }
    const int64_t pixel = (n * args.H + t.y) * args.W + t.xa, count = t.count();
    const Acc* m = static_cast<const Acc*>(args.stats) + pixel;
    const Acc* log_sum = m + pixels;
    const uint8_t* selected = args.bcl_steps ? static_cast<const uint8_t*>(args.selected) + pixel : nullptr;
    source.load(n, t, z);
    load_labels(args, n, t, labels);
    find_pull(args, z, work.pitch, count, labels, m, log_sum, selected, pull);
    for (int64_t i = 0; i < count; ++i) factor[i] = pull[i];
    if (selected && args.bcl_flipped) add_flipped_factor(args, selected, count, factor);

    if (work.runs && sparse.collect(n, t)) {
      for (int64_t c = 0; c < args.C; ++c)
        for (int64_t i = 0; i < count; ++i)
          z[c * work.pitch + i] = exp_nonpositive((z[c * work.pitch + i] - m[i]) - log_sum[i]);
      sparse.multiply(z, factor);
      for (int64_t c = 0; c < args.C; ++c)
        for (int64_t i = 0; i < count; ++i)
          z[c * work.pitch + i] = factor[i] != 0 ? factor[i] * z[c * work.pitch + i] : 0;
      sparse.add_to(z);
    } else {
      for (int64_t c = 0; c < args.C; ++c)
        for (int64_t i = 0; i < count; ++i) {
          const Acc p = exp_nonpositive((z[c * work.pitch + i] - m[i]) - log_sum[i]);
          z[c * work.pitch + i] = factor[i] != 0 ? factor[i] * p : 0;  // 0 * NaN of an ignored pixel is 0 here
        }
    }
    for (int64_t i = 0; i < count; ++i)
      if (labels[i] >= 0) z[labels[i] * work.pitch + i] -= pull[i];
    if (selected && args.bcl_flipped) subtract_flipped(args, work, n, t, selected, z);
    source.add_gradient(n, t, z);
    if (last) source.end(block, t);
  });
}

template <typename Acc>
static void forward(const LossArgs& args, const LossWork<Acc>& work, int64_t begin, int64_t end, Acc* scratch,
                    LossPartial* partials) {
  if (args.resampled()) return forward_from<Acc, Resampled<Acc>>(args, work, begin, end, scratch, partials);
  forward_from<Acc, Direct<Acc>>(args, work, begin, end, scratch, partials);
}

template <typename Acc>
static void backward(const LossArgs& args, const LossWork<Acc>& work, int64_t begin, int64_t end, Acc* scratch) {
  if (args.resampled()) return backward_from<Acc, Resampled<Acc>>(args, work, begin, end, scratch);
  backward_from<Acc, Direct<Acc>>(args, work, begin, end, scratch);
}

// OHEM, with the cutoff known: by rows, the sum of w * nll over the kept pixels, and their number.
template <typename Acc>
static void sum_kept(const LossArgs& args, const LossWork<Acc>& work, Acc cutoff, int64_t begin, int64_t end,
                     TermPartial* partials) {
  const Acc* weight = static_cast<const Acc*>(args.weight);
  const auto least = key_of(cutoff);
  int labels[kMaxTilePixels];
  for (int64_t row = begin; row < end; ++row) {
    LaneSums<double> sums;
    LaneSums<int32_t> counts;
    for (int64_t xa = 0; xa < args.W; xa += kMaxTilePixels) {
      const Tile t = {row % args.H, 1, xa, args.W - xa < kMaxTilePixels ? args.W : xa + kMaxTilePixels};
      if (weight) load_labels(args, row / args.H, t, labels);
      const Acc* nll = work.nll + row * args.W + xa;
      for_lanes(t.count(), [&](int64_t i, int64_t lane) {
        const bool kept = nll[i] != -1 && key_of(nll[i]) >= least;
        const Acc w = weight && kept ? weight[labels[i]] : 1;
        sums.lane[lane] += kept ? w * nll[i] : 0;
        counts.lane[lane] += kept;
      });
    }
    partials[row] = {sums.total(), counts.total()};
  }
}

// The lowest class of those with the largest logit; NaN is larger than all, as in torch.argmax.
template <typename Acc, typename Source, typename Class>
static void argmax_from(const LossArgs& args, const LossWork<Acc>& work, int64_t begin, int64_t end, Acc* scratch,
                        Class* classes) {
  Acc* z = scratch;
  Source source(args, work, scratch + args.C * work.pitch);
  for_tiles(args, work, begin, end, [&](int64_t n, int64_t, Tile t, bool first, bool) {
    if (first) source.begin(n, t);
    source.load(n, t, z);
    Acc best[kMaxTilePixels];
    int32_t found[kMaxTilePixels];
    for (int64_t i = 0; i < t.count(); ++i) best[i] = z[i], found[i] = 0;
    for (int64_t c = 1; c < args.C; ++c)
      for (int64_t i = 0; i < t.count(); ++i) {
        const Acc value = z[c * work.pitch + i];
        const bool better = value > best[i] || (value != value && best[i] == best[i]);
        best[i] = better ? value : best[i];
        found[i] = better ? static_cast<int32_t>(c) : found[i];
      }
    Class* to = classes + (n * args.H + t.y) * args.W + t.xa;
    for (int64_t i = 0; i < t.count(); ++i) to[i] = static_cast<Class>(found[i]);
  });
}

template <typename Acc, typename Source>
static void argmax_as(const LossArgs& args, const LossWork<Acc>& work, int64_t begin, int64_t end, Acc* scratch,
                      void* classes) {
  if (args.C <= 256) return argmax_from<Acc, Source>(args, work, begin, end, scratch, static_cast<uint8_t*>(classes));
  argmax_from<Acc, Source>(args, work, begin, end, scratch, static_cast<int32_t*>(classes));
}

template <typename Acc>
static void argmax(const LossArgs& args, const LossWork<Acc>& work, int64_t begin, int64_t end, Acc* scratch,
                   void* classes) {
  if (args.resampled()) return argmax_as<Acc, Resampled<Acc>>(args, work, begin, end, scratch, classes);
  argmax_as<Acc, Direct<Acc>>(args, work, begin, end, scratch, classes);
}

// The labels as 16-bit classes, which BCL and CPG read again and again. (Bad ones count as ignored here.)
template <typename Acc>
static void identify(const LossArgs& args, const LossWork<Acc>& work, int64_t begin, int64_t end) {
  int labels[kMaxTilePixels];
  for (int64_t row = begin; row < end; ++row)
    for (int64_t xa = 0; xa < args.W; xa += kMaxTilePixels) {
      const Tile t = {row % args.H, 1, xa, args.W - xa < kMaxTilePixels ? args.W : xa + kMaxTilePixels};
      load_labels(args, row / args.H, t, labels);
      uint16_t* ids = work.ids + row * args.W + xa;
      for (int64_t i = 0; i < t.count(); ++i) ids[i] = labels[i] >= 0 ? static_cast<uint16_t>(labels[i]) : kIgnoredId;
    }
}

template <typename Acc>
constexpr LossKernels<Acc> kernels = {forward<Acc>,    backward<Acc>,   identify<Acc>, sum_kept<Acc>,
                                      find_edges<Acc>, select<Acc>,     compare<Acc>,  find_residuals<Acc>,
                                      argmax<Acc>,     join_halves<Acc>};

}  // namespace BCMF_ISA
}  // namespace bcmf::cpu
