// The CUDA kernels of bcmf::loss. What they do per label pixel, of S bytes a logit:
// - loss_tiles: reads C logits twice (the second time from L1 or L2), takes C exps, writes stats (8 bytes; of fp64 16),
//   with OHEM the loss and with BCL a score per step (4 each);
// - ohem_*: read the loss (levels + 1) times;
// - bcl_tiles: reads the scores once (their neighbours from L1), writes a byte;
// - cpg_tiles: reads the label; in a tile whose labels differ, for each class that occurs there, an exp and about
//   4 (2r + 1)^2 products;
// - gradient_tiles: reads C logits and stats, takes C exps, writes C gradients; with CPG, in such a tile, for each
// class
//   that occurs, twice what cpg_tiles does, and as many products again.
// Logits of another size come from L1, two pairs per class and stack. Their gradients are summed up by tiles in shared
// memory: (1 + H / 8h) (1 + W / 32w) times the logits are written and read once more, in fp32.
#pragma once

#include "bcl.cuh"
#include "cpg.cuh"
#include "logits.cuh"
#include "select.cuh"

namespace bcmf::device {

// Rows of the table of partial sums, (kSums, tiles): of the forward; then two for each of BCL's steps, and CPG's two.
enum Sum : int { kNumerator, kCount, kHard, kValidPixels, kBadLabels, kForwardSums };

// Writes stats, nll with OHEM, scores with BCL, and the tile's sums.
template <typename Source>
__global__ void __launch_bounds__(kThreads, 1)
    loss_tiles(const __grid_constant__ LossArgs args, typename Source::Acc* scores, double* partials) {
  using Acc = typename Source::Acc;
  const Tile tile(args);
  const Source source(args, tile);
  const int64_t pixels = args.N * args.H * args.W;
  Acc m[kStack], sum[kStack] = {}, z[kStack];
  source.stack(0, m);
  for (int64_t c = 1; c < args.C; ++c) {
    source.stack(c, z);
#pragma unroll
    for (int k = 0; k < kStack; ++k) m[k] = z[k] > m[k] ? z[k] : m[k];
  }
  for (int64_t c = 0; c < args.C; ++c) {
    source.stack(c, z);
#pragma unroll
    for (int k = 0; k < kStack; ++k) sum[k] += exp(z[k] - m[k]);
  }
  double sums[kForwardSums] = {};
  for_stack(tile, [&](int k) {
    const int64_t pixel = tile.pixel(args, k);
    const Acc log_sum = log(sum[k]);
    static_cast<Acc*>(args.stats)[pixel] = m[k];
    static_cast<Acc*>(args.stats)[pixels + pixel] = log_sum;
    const auto loss_of_class = [&](int c) { return (m[k] - source.at(tile.n, tile.y(k), tile.x(), c)) + log_sum; };
    const int label = read_label(args, tile.n, tile.y(k), tile.x());
    // A bad label: no assert, no look from the host; the loss says it.
    const Acc nll = label >= 0 ? loss_of_class(label) : static_cast<Acc>(label == kBad ? nan("") : -1);
    if (args.ohem) static_cast<Acc*>(args.nll)[pixel] = nll;
    for (int s = 0; s < args.bcl_steps; ++s)
      scores[s * pixels + pixel] =
          label < 0 ? Acc(-1) : score_of(args, s, tile.n, tile.y(k), tile.x(), label, nll, loss_of_class);
    if (label == kIgnored) return;
    const Acc w = label >= 0 ? weight_of<Acc>(args, label) : Acc(1);
    sums[kNumerator] += w * nll;
    sums[kCount] += w;
    sums[kHard] += key_of(nll) >= key_of(static_cast<Acc>(args.ohem_cutoff));
    sums[kValidPixels] += 1;
    sums[kBadLabels] += label == kBad;
  });
  store_partials(sums, partials);
}

using Count = unsigned long long;  // of pixels of the batch

// OHEM, first step: how many of the largest losses to look for. None if enough pixels are above the threshold.
template <typename Acc>
__global__ void __launch_bounds__(kThreads) ohem_begin(const __grid_constant__ LossArgs args, const double* partials,
                                                       int64_t tiles, Selection<Acc>* selection, Count* histogram) {
  const double hard = load_partials(partials + kHard * tiles, tiles);
  const double valid = load_partials(partials + kValidPixels * tiles, tiles);
  for (int digit = threadIdx.x; digit < kDigits; digit += kThreads) histogram[digit] = 0;
  if (threadIdx.x == 0) {
    const double kept = args.ohem_min_kept < valid ? static_cast<double>(args.ohem_min_kept) : valid;
    *selection = {0, hard >= kept ? 0 : static_cast<int64_t>(kept)};
  }
}

// Counts the digits of the tile's losses that have the prefix.
template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    ohem_count(const __grid_constant__ LossArgs args, const Selection<Acc>* selection, int level, Count* histogram) {
  if (selection->rank == 0) return;
  BCMF_SHARED(unsigned, counts, kDigits);
  for (int digit = threadIdx.x; digit < kDigits; digit += kThreads) counts[digit] = 0;
  __syncthreads();
  const auto prefix = selection->prefix;
  const Tile tile(args);
  for_stack(tile, [&](int k) {
    const Acc nll = static_cast<const Acc*>(args.nll)[tile.pixel(args, k)];
    const int digit = nll == -1 ? -1 : digit_of<Acc>(key_of(nll), prefix, level);
    if (digit >= 0) atomicAdd(&counts[digit], 1u);
  });
  __syncthreads();
  for (int digit = threadIdx.x; digit < kDigits; digit += kThreads)
    if (counts[digit] > 0) atomicAdd(&histogram[digit], Count{counts[digit]});
}

// Adds the digit in which the loss looked for lies to the prefix, and empties the histogram. By one block.
template <typename Acc>
__global__ void __launch_bounds__(kThreads) ohem_choose(Selection<Acc>* selection, int level, Count* histogram) {
  constexpr int kOwn = kDigits / kThreads;  // digits of a thread; thread 0 has the largest
  BCMF_SHARED(int64_t, above, kThreads);
  const int64_t rank = selection->rank;
  if (rank == 0) return;
  const int top = kDigits - 1 - threadIdx.x * kOwn;
  int64_t own = 0;
  for (int k = 0; k < kOwn; ++k) own += histogram[top - k];
  above[threadIdx.x] = own;
  __syncthreads();
  int64_t larger = 0;  // losses in the digits of the threads before this one
  for (unsigned thread = 0; thread < threadIdx.x; ++thread) larger += above[thread];
  __syncthreads();  // `selection` is written below by the one thread that has found it
  for (int k = 0; k < kOwn; ++k) {
    const int64_t count = histogram[top - k];
    histogram[top - k] = 0;
    if (larger < rank && rank <= larger + count) {
      selection->prefix |= static_cast<typename KeyOf<Acc>::type>(top - k) << digit_shift<Acc>(level);
      selection->rank = rank - larger;
    }
    larger += count;
  }
}

// With the cutoff known: partial sums of w * nll over the kept pixels, and their number, in place of the sums over all.
template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    ohem_sum_tiles(const __grid_constant__ LossArgs args, const Selection<Acc>* selection, double* partials) {
  const Acc exceeds = static_cast<Acc>(args.ohem_cutoff);
  const bool found = selection->rank > 0 && selection->prefix < key_of(exceeds);
  const Acc cutoff = found ? loss_of<Acc>(selection->prefix) : exceeds;
  double sums[2] = {};
  const Tile tile(args);
  for_stack(tile, [&](int k) {
    const Acc nll = static_cast<const Acc*>(args.nll)[tile.pixel(args, k)];
    if (nll == -1 || key_of(nll) < key_of(cutoff)) return;
    const int label = read_label(args, tile.n, tile.y(k), tile.x());
    sums[0] += (label >= 0 ? weight_of<Acc>(args, label) : Acc(1)) * nll;
    sums[1] += 1;
  });
  store_partials(sums, partials);
  if (blockIdx.x == 0 && threadIdx.x == 0) static_cast<Acc*>(args.summary)[kCutoff] = cutoff;
}

// The means, from the totals of all partial sums. A bad label makes all of them NaN. By one thread.
template <typename Acc>
__global__ void loss_finish(const __grid_constant__ LossArgs args, const double* totals) {
  const auto ratio = [](double numerator, double count) { return count != 0 ? numerator / count : 0; };
  const double valid = totals[kValidPixels], bad = totals[kBadLabels] > 0 ? nan("") : 0;
  Acc* summary = static_cast<Acc*>(args.summary);
  const Acc cutoff = args.ohem && valid > 0 ? summary[kCutoff] : Acc(0);  // by ohem_sum_tiles
  for (int entry = 0; entry < kSummarySize; ++entry) summary[entry] = 0;
  summary[kValid] = static_cast<Acc>(valid);
  double terms[kTerms] = {};
  if (args.ce) {
    summary[kDenominator] = static_cast<Acc>(totals[kCount]);
    summary[kCutoff] = cutoff;
    terms[kCe] = ratio(totals[kNumerator], totals[kCount]) + bad;
  }
  const double* sums = totals + kForwardSums;
  for (int s = 0; s < args.bcl_steps; ++s, sums += 2) {
    summary[kSelected + s] = static_cast<Acc>(sums[1]);
    terms[kBcl] += ratio(sums[0], args.bcl_flipped ? valid : sums[1]) / args.bcl_steps + bad;
  }
  if (args.cpg_radius > 0) {
    summary[kEdges] = static_cast<Acc>(sums[1]);
    terms[kCpg] = ratio(sums[0], sums[1]) + bad;
  }
  for (int term = 0; term < kTerms; ++term) static_cast<Acc*>(args.terms)[term] = static_cast<Acc>(terms[term]);
  double total = terms[kCe];
  if (args.bcl_steps > 0) total += args.bcl_weight * terms[kBcl];
  if (args.cpg_radius > 0) total += args.cpg_weight * terms[kCpg];
  *static_cast<Acc*>(args.total) = static_cast<Acc>(total);
}

// What the cross-entropy and BCL ask of a pixel: `pull` of p towards the one-hot label, exactly 0 where nothing.
template <typename Acc, typename F>
__device__ __forceinline__ Acc pull_of(const LossArgs& args, int64_t pixel, int label, F loss_of_class) {
  const Acc* summary = static_cast<const Acc*>(args.summary);
  const Acc upstream = *static_cast<const Acc*>(args.grad_total), denominator = summary[kDenominator];
  if (label < 0) return label == kBad ? static_cast<Acc>(nan("")) : Acc(0);
  Acc pull = args.ce && denominator != 0 ? upstream / denominator * weight_of<Acc>(args, label) : Acc(0);
  // The forward's own arithmetic, so that the same pixels are kept.
  if (args.ohem && key_of(loss_of_class(label)) < key_of(summary[kCutoff])) pull = 0;
  if (args.bcl_steps > 0 && !args.bcl_flipped) {
    const uint8_t selected = static_cast<const uint8_t*>(args.selected)[pixel];
    for (int s = 0; s < args.bcl_steps; ++s)
      if (selected >> s & 1) pull += bcl_scale<Acc>(args, summary[kSelected + s]);
  }
  return pull;
}

// The gradient of the logits of label size, class by class: p (pull + flipped pulls + g - sum of p g) - pulls, where g
// is CPG's derivative by p. kSparse: with CPG or BCL's flipped labels.
template <typename Source, typename Sink, bool kSparse>
__global__ void __launch_bounds__(kThreads, 1) gradient_tiles(const __grid_constant__ LossArgs args, Sink sink) {
  using Acc = typename Source::Acc;
  using TileWindow = Window<Acc, kSparse ? kMaxRadius : 0>;
  constexpr int kLabels = kSparse ? TileWindow::kLabels : 1;
  BCMF_SHARED(Acc, scratch, kLabels > Sink::kScratch ? kLabels : Sink::kScratch);
  const Tile tile(args);
  const Source source(args, tile);
  const int64_t pixels = args.N * args.H * args.W;
  sink.begin(args, tile, scratch);

  Acc m[kStack] = {}, log_sum[kStack] = {}, pull[kStack] = {}, factor[kStack] = {};
  int label[kStack];
  for_stack(tile, [&](int k) {
    const int64_t pixel = tile.pixel(args, k);
    m[k] = static_cast<const Acc*>(args.stats)[pixel];
    log_sum[k] = static_cast<const Acc*>(args.stats)[pixels + pixel];
    label[k] = read_label(args, tile.n, tile.y(k), tile.x());
    pull[k] = pull_of<Acc>(args, pixel, label[k],
                           [&](int c) { return (m[k] - source.at(tile.n, tile.y(k), tile.x(), c)) + log_sum[k]; });
    factor[k] = pull[k];
    if constexpr (kSparse) factor[k] += flipped_pull<Acc>(args, pixel);
  });
  Acc z[kStack], value[kStack] = {};
  const auto probability = [&](int k) { return exp((z[k] - m[k]) - log_sum[k]); };
  const auto dense = [&](int k, int64_t c) {
    const Acc product = factor[k] != 0 ? factor[k] * probability(k) : Acc(0);  // 0 * NaN of an ignored pixel is 0 here
    return c == label[k] ? product - pull[k] : product;
  };

  if constexpr (kSparse) {
    TileWindow window(args, scratch);
    const bool mixed = args.cpg_radius > 0 && window.load(args, tile);
    for (int64_t c = 0; c < args.C && mixed; ++c) {
      if (!window.holds(c)) continue;
      window.find_residuals(args, tile, source, c);
      source.stack(c, z);
      for_stack(tile, [&](int k) {
        const Acc g = window.gradient(args, tile, k);
        if (g != 0) factor[k] -= probability(k) * g;  // p may be NaN where nothing is compared
      });
    }
    for (int64_t c = 0; c < args.C; ++c) {
      const bool holds = mixed && window.holds(c);
      if (holds) window.find_residuals(args, tile, source, c);
      source.stack(c, z);
      for_stack(tile, [&](int k) {
        value[k] = dense(k, c);
        if (args.bcl_flipped) value[k] -= flipped_pull_of<Acc>(args, tile.n, tile.y(k), tile.x(), c);
        const Acc g = holds ? window.gradient(args, tile, k) : Acc(0);
        if (g != 0) value[k] += probability(k) * g;
      });
      sink.put(args, tile, c, value, scratch);
    }
  } else {
    for (int64_t c = 0; c < args.C; ++c) {
      source.stack(c, z);
      for_stack(tile, [&](int k) { value[k] = dense(k, c); });
      sink.put(args, tile, c, value, scratch);
    }
  }
}

}  // namespace bcmf::device
