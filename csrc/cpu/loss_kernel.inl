// The CPU kernels of bcmf::loss. Each isa_<name>.cpp sets the target, defines BCMF_ISA, and includes this file. Loops
// over the pixels of a tile are plain ones, which the compiler vectorises, or take vectors (math.h) where values stay
// in registers from class to class. Nothing here comes from torch, or from those parts of the standard library that the
// linker could merge across instruction sets.

#include "common/geometry.h"
#include "common/select.h"
#include "common/terms.h"
#include "cpu/entries.h"
#include "cpu/loss_kernel.h"
#include "cpu/math.h"
#include "cpu/read_once.h"

namespace bcmf::cpu {
namespace BCMF_ISA {

// A rectangle of label pixels that are worked on together: columns xa..xb of `rows` rows from y on. If it has several
// rows, they are whole ones.
struct Tile {
  int64_t y, rows, xa, xb;
  int64_t count() const { return rows * (xb - xa); }
};

#include "cpu/logits.inl"
// The following files use logits.inl.
#include "cpu/bcl.inl"
#include "cpu/cpg.inl"

// Calls f(n, block, tile, first, last) for the tiles of the blocks begin..end of the batch. first and last tell whether
// the tile is the first or the last one in its strip of columns.
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

template <typename Label>
static void load_labels_as(const LossArgs& args, int64_t n, Tile t, int* __restrict labels) {
  const LabelView& v = args.labels;
  Label ids[kMaxTilePixels];
  for (int64_t y = t.y; y < t.y + t.rows; ++y, labels += t.xb - t.xa) {
    const Label* row = static_cast<const Label*>(v.data) + n * v.stride_n + y * v.stride_h + t.xa * v.stride_w;
    copy_once(row, v.stride_w, t.xb - t.xa, ids);
    for (int64_t i = 0; i < t.xb - t.xa; ++i) labels[i] = classify_label(ids[i], args.C, args.ignore_index);
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

// Finds the maximum m of the logits of each pixel, and log sum_c exp(z_c - m). It works on whole vectors: their entries
// beyond `count`, for which a tile has room, may become anything.
template <typename Acc, typename Ahead>
static void log_sum_exp(const LossArgs& args, const Ahead& ahead, const Acc* z, int64_t pitch, int64_t count, Acc* m,
                        Acc* log_sum) {
  for (int64_t i = 0; i < count; i += kWidth<Acc>) {
    Vector<Acc> largest = load_vector(z + i), sum = {};
    for (int64_t c = 1; c < args.C; ++c) {
      const Vector<Acc> value = load_vector(z + c * pitch + i);
      largest = value > largest ? value : largest;
    }
    for (int64_t c = 0; c < args.C; ++c) {
      ahead.fetch(c, i);
      sum += exp_nonpositive(load_vector(z + c * pitch + i) - largest);
    }
    store_vector(largest, m + i);
    store_vector(log_positive(sum), log_sum + i);
  }
}

// Finds the class weights of a tile's pixels; they are 0 where there is no class.
template <typename Acc>
BCMF_INLINE void find_weights(const LossArgs& args, const int* labels, int64_t count, Acc* __restrict weights) {
  const Acc* __restrict weight = static_cast<const Acc*>(args.weight);
  for (int64_t i = 0; i < count; ++i) weights[i] = labels[i] < 0 ? Acc(0) : Acc(1);
  if (!weight) return;
  for (int64_t i = 0; i < count; ++i) weights[i] *= weight[labels[i] < 0 ? 0 : labels[i]];
}

// Finds the losses of a tile's pixels; they are -1 where there is no class.
template <typename Acc>
BCMF_INLINE void find_losses(const Acc* z, int64_t pitch, int64_t count, const int* labels, const Acc* m,
                             const Acc* log_sum, Acc* __restrict nll) {
  for (int64_t i = 0; i < count; ++i) nll[i] = z[(labels[i] < 0 ? 0 : labels[i]) * pitch + i];
  for (int64_t i = 0; i < count; ++i) nll[i] = labels[i] >= 0 ? (m[i] - nll[i]) + log_sum[i] : Acc(-1);
}

// Adds up the losses of a tile's pixels, first in the lanes of a vector. `hard` is the key of the smallest loss that
// counts as hard. The last vector of nll and weights is filled up with values that do not count.
template <typename Acc>
static LossPartial sum_losses(int64_t count, typename KeyOf<Acc>::type hard, Acc* nll, Acc* weights) {
  for (int64_t i = count; i % kWidth<Acc> != 0; ++i) nll[i] = -1, weights[i] = 0;
  Sums<Acc> weighted_nll = {}, weight = {}, hard_nll = {};
  Mask<Acc> above = {}, valid = {};
  for (int64_t i = 0; i < count; i += kWidth<Acc>) {
    const Vector<Acc> loss = load_vector(nll + i), w = load_vector(weights + i), product = w * loss;
    const auto key = bit_cast<Vector<typename KeyOf<Acc>::type>>(loss) << 1 >> 1;
    const Mask<Acc> is_valid = loss != -1, is_hard = is_valid & (key >= hard);
    weighted_nll += __builtin_convertvector(product, Sums<Acc>);
    weight += __builtin_convertvector(w, Sums<Acc>);
    hard_nll += __builtin_convertvector(is_hard ? product : Vector<Acc>{}, Sums<Acc>);
    above -= is_hard, valid -= is_valid;
  }
  return {add_lanes<double>(weighted_nll), add_lanes<double>(weight), add_lanes<double>(hard_nll),
          add_lanes<int64_t>(above),       add_lanes<int64_t>(valid), 0};
}

template <typename Acc, typename Source>
static void dense_forward_from(const LossArgs& args, const LossWork<Acc>& work, int64_t begin, int64_t end,
                               Acc* scratch, LossPartial* partials) {
  const auto hard = key_of(static_cast<Acc>(args.ohem_cutoff));
  Acc* z = scratch;
  Source source(args, work, scratch + args.C * work.pitch);
  int labels[kMaxTilePixels];
  Acc m[kMaxTilePixels], log_sum[kMaxTilePixels], nll[kMaxTilePixels], weights[kMaxTilePixels];
  for_tiles(args, work, begin, end, [&](int64_t n, int64_t block, Tile t, bool first, bool) {
    if (first) source.begin(n, t);
    const int64_t pixel = (n * args.H + t.y) * args.W + t.xa, count = t.count();
    source.load(n, t, z);
    load_labels(args, n, t, labels);
    log_sum_exp(args, source.ahead(n, t), z, work.pitch, count, m, log_sum);
    find_losses(z, work.pitch, count, labels, m, log_sum, nll);
    Acc* stats = static_cast<Acc*>(args.stats) + pixel;
    for (int64_t i = 0; i < count; ++i) stats[i] = m[i];
    for (int64_t i = 0; i < count; ++i) stats[args.N * args.H * args.W + i] = log_sum[i];
    if (work.nll)
      for (int64_t i = 0; i < count; ++i) work.nll[pixel + i] = nll[i];
    for (int s = 0; s < args.bcl_steps; ++s) score_tile(args, work, s, n, t, z, nll, m, log_sum);

    find_weights(args, labels, count, weights);
    LossPartial sum = sum_losses(count, hard, nll, weights);
    for (int64_t i = 0; i < count; ++i) sum.bad_labels += labels[i] == kBad;
    partials[block] += sum;
  });
}

// Finds the pull of the cross-entropy and BCL on p of each pixel, towards its label. It is exactly 0 where neither
// selects the pixel.
template <typename Acc>
static void find_pull(const LossArgs& args, const Acc* z, int64_t pitch, int64_t count, const int* labels, const Acc* m,
                      const Acc* log_sum, const uint8_t* selected, Acc* pull) {
  const Acc* summary = static_cast<const Acc*>(args.summary);
  const Acc denominator = summary[kDenominator], upstream = *static_cast<const Acc*>(args.grad_total);
  const Acc scale = args.ce && denominator != 0 ? upstream / denominator : 0;
  find_weights(args, labels, count, pull);
  for (int64_t i = 0; i < count; ++i)
    pull[i] = labels[i] == kBad ? static_cast<Acc>(__builtin_nan("")) : scale * pull[i];
  if (args.ohem) {  // losses have the forward's bits, so that the same pixels are kept, those at the cutoff too
    const auto cutoff = key_of(summary[kCutoff]);
    Acc nll[kMaxTilePixels];
    find_losses(z, pitch, count, labels, m, log_sum, nll);
    for (int64_t i = 0; i < count; ++i) pull[i] = labels[i] >= 0 && key_of(nll[i]) < cutoff ? 0 : pull[i];
  }
  if (selected && !args.bcl_flipped) {
    for (int s = 0; s < args.bcl_steps; ++s) {
      const Acc of_step = bcl_scale<Acc>(args, summary[kSelected + s]);
      for (int64_t i = 0; i < count; ++i) pull[i] += selected[i] >> s & 1 ? of_step : 0;
    }
  }
}

// Turns z into p, or into factor * p.
template <bool WithFactor, typename Acc, typename Ahead>
static void find_probabilities(const LossArgs& args, const Ahead& ahead, int64_t pitch, int64_t count, const Acc* m,
                               const Acc* log_sum, const Acc* factor, Acc* z) {
  for (int64_t i = 0; i < count; i += kWidth<Acc>) {
    const Vector<Acc> largest = load_vector(m + i), log = load_vector(log_sum + i), f = load_vector(factor + i);
    for (int64_t c = 0; c < args.C; ++c) {
      ahead.fetch(c, i);
      const Vector<Acc> p = exp_nonpositive((load_vector(z + c * pitch + i) - largest) - log);
      const Vector<Acc> product = f != 0 ? f * p : Vector<Acc>{};  // 0 * NaN of an ignored pixel is 0 here
      store_vector(WithFactor ? product : p, z + c * pitch + i);
    }
  }
}

template <typename Acc, typename Source>
static void dense_backward_from(const LossArgs& args, const LossWork<Acc>& work, int64_t begin, int64_t end,
                                Acc* scratch, RowEdgeRuns<Acc>* edge_runs) {
  const int64_t tile_size = args.C * work.pitch, pixels = args.N * args.H * args.W;
  Acc* z = scratch;
  Source source(args, work, scratch + tile_size);
  SparseGradient<Acc> sparse(args, work, scratch + 5 * tile_size, edge_runs);
  int labels[kMaxTilePixels];
  Acc m[kMaxTilePixels], log_sum[kMaxTilePixels];
  // The dense gradient is factor * p - pull at the label; CPG and flipped labels add sparse parts.
  Acc pull[kMaxTilePixels], factor[kMaxTilePixels];
  for_tiles(args, work, begin, end, [&](int64_t n, int64_t block, Tile t, bool first, bool last) {
    if (first) {
      source.begin(n, t);
      source.clear_sums();
      sparse.begin(source, block);
    }
    const int64_t pixel = (n * args.H + t.y) * args.W + t.xa, count = t.count();
    const Acc* stats = static_cast<const Acc*>(args.stats) + pixel;
    for (int64_t i = 0; i < count; ++i) m[i] = stats[i];
    for (int64_t i = 0; i < count; ++i) log_sum[i] = stats[pixels + i];
    const uint8_t* selected = args.bcl_steps ? static_cast<const uint8_t*>(args.selected) + pixel : nullptr;
    source.load(n, t, z);
    load_labels(args, n, t, labels);
    find_pull(args, z, work.pitch, count, labels, m, log_sum, selected, pull);
    for (int64_t i = 0; i < count; ++i) factor[i] = pull[i];
    if (selected && args.bcl_flipped) add_flipped_factor(args, selected, count, factor);

    if (sparse.reaches(n, t)) {
      find_probabilities<false>(args, source.ahead(n, t), work.pitch, count, m, log_sum, factor, z);
      sparse.find(n, t, z, factor);
      sparse.add_to(factor, count, z);
    } else {
      find_probabilities<true>(args, source.ahead(n, t), work.pitch, count, m, log_sum, factor, z);
    }
    for (int64_t i = 0; i < count; ++i)
      if (labels[i] >= 0) z[labels[i] * work.pitch + i] -= pull[i];
    if (selected && args.bcl_flipped) subtract_flipped(args, work, n, t, selected, z);
    source.add_gradient(n, t, z);
    if (last) source.end(block, t);
  });
}

template <typename Acc>
static void dense_forward(const LossArgs& args, const LossWork<Acc>& work, int64_t begin, int64_t end, Acc* scratch,
                          LossPartial* partials) {
  if (args.resampled()) return dense_forward_from<Acc, Resampled<Acc>>(args, work, begin, end, scratch, partials);
  dense_forward_from<Acc, Direct<Acc>>(args, work, begin, end, scratch, partials);
}

template <typename Acc>
static void dense_backward(const LossArgs& args, const LossWork<Acc>& work, int64_t begin, int64_t end, Acc* scratch,
                           RowEdgeRuns<Acc>* edge_runs) {
  if (args.resampled()) return dense_backward_from<Acc, Resampled<Acc>>(args, work, begin, end, scratch, edge_runs);
  dense_backward_from<Acc, Direct<Acc>>(args, work, begin, end, scratch, edge_runs);
  finish_streams();
}

// Once OHEM's cutoff is known, finds for each row the sum of w * nll over the kept pixels, and their number.
template <typename Acc>
static void ohem_sum(const LossArgs& args, const LossWork<Acc>& work, Acc cutoff, int64_t begin, int64_t end,
                     TermPartial* partials) {
  int labels[kMaxTilePixels];
  Acc nll[kMaxTilePixels], weights[kMaxTilePixels];
  for (int64_t row = begin; row < end; ++row) {
    TermPartial partial = {};
    for (int64_t xa = 0; xa < args.W; xa += kMaxTilePixels) {
      const Tile t = {row % args.H, 1, xa, args.W - xa < kMaxTilePixels ? args.W : xa + kMaxTilePixels};
      load_labels(args, row / args.H, t, labels);
      find_weights(args, labels, t.count(), weights);
      for (int64_t i = 0; i < t.count(); ++i) nll[i] = work.nll[row * args.W + xa + i];
      const LossPartial sum = sum_losses(t.count(), key_of(cutoff), nll, weights);
      partial.sum += sum.hard_nll;
      partial.count += sum.hard;
    }
    partials[row] = partial;
  }
}

// Finds for each pixel of a tile the lowest class of those with the largest logit; NaN is larger than all, as in
// torch.argmax.
template <typename Acc>
static void argmax_of_tile(const LossArgs& args, const Acc* z, int64_t pitch, int64_t count, int32_t* classes) {
  typedef int32_t Classes __attribute__((vector_size(kWidth<Acc> * sizeof(int32_t))));
  for (int64_t i = 0; i < count; i += kWidth<Acc>) {
    Vector<Acc> best = load_vector(z + i);
    Mask<Acc> found = {}, current = {};
    for (int64_t c = 1; c < args.C; ++c) {
      current += 1;
      const Vector<Acc> value = load_vector(z + c * pitch + i);
      const Mask<Acc> better = (value > best) | ((value != value) & (best == best));
      best = better ? value : best;
      found = better ? current : found;
    }
    const Classes narrow = __builtin_convertvector(found, Classes);
    std::memcpy(classes + i, &narrow, sizeof(narrow));
  }
}

// `bins` is null, or takes counts of label and class (C, C), then of pixels with a bad label, then of ignored ones.
template <typename Acc, typename Source, typename Class>
static void argmax_from(const LossArgs& args, const LossWork<Acc>& work, int64_t begin, int64_t end, Acc* scratch,
                        Class* classes, int64_t* bins) {
  Acc* z = scratch;
  Source source(args, work, scratch + args.C * work.pitch);
  int labels[kMaxTilePixels];
  int32_t found[kMaxTilePixels];
  for_tiles(args, work, begin, end, [&](int64_t n, int64_t, Tile t, bool first, bool) {
    if (first) source.begin(n, t);
    source.load(n, t, z);
    argmax_of_tile(args, z, work.pitch, t.count(), found);
    Class* to = classes + (n * args.H + t.y) * args.W + t.xa;
    for (int64_t i = 0; i < t.count(); ++i) to[i] = static_cast<Class>(found[i]);
    if (!bins) return;
    load_labels(args, n, t, labels);
    for (int64_t i = 0; i < t.count(); ++i)
      ++bins[labels[i] >= 0 ? labels[i] * args.C + found[i] : args.C * args.C + (labels[i] == kIgnored)];
  });
}

template <typename Acc, typename Source>
static void argmax_as(const LossArgs& args, const LossWork<Acc>& work, int64_t begin, int64_t end, Acc* scratch,
                      void* classes, int64_t* bins) {
  if (args.C <= 256)
    return argmax_from<Acc, Source>(args, work, begin, end, scratch, static_cast<uint8_t*>(classes), bins);
  argmax_from<Acc, Source>(args, work, begin, end, scratch, static_cast<int32_t*>(classes), bins);
}

template <typename Acc>
static void argmax(const LossArgs& args, const LossWork<Acc>& work, int64_t begin, int64_t end, Acc* scratch,
                   void* classes, int64_t* bins) {
  if (args.resampled()) return argmax_as<Acc, Resampled<Acc>>(args, work, begin, end, scratch, classes, bins);
  argmax_as<Acc, Direct<Acc>>(args, work, begin, end, scratch, classes, bins);
}

// Reads the labels as 16-bit ids, which BCL and CPG then read again and again. (Bad labels count as ignored here.)
template <typename Acc>
static void read_ids(const LossArgs& args, const LossWork<Acc>& work, int64_t begin, int64_t end) {
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
constexpr LossKernels<Acc> kernels = {dense_forward<Acc>, dense_backward<Acc>, read_ids<Acc>, ohem_sum<Acc>,
                                      bcl_select<Acc>,    cpg_compare<Acc>,    argmax<Acc>,   low_gather<Acc>};

}  // namespace BCMF_ISA
}  // namespace bcmf::cpu
