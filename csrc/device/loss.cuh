// The CUDA kernels of bcmf::loss, named after the steps in docs/definitions.md. For each label pixel,
// - dense_forward reads C logits, takes 5 exps for 4 classes (resampled, 2 for each), and writes stats (8 bytes, in
//   fp64 16), with OHEM the loss and with BCL a score for each step (4 bytes each, in fp64 8);
// - ohem_count and ohem_sum read the loss (levels + 1) times;
// - bcl_select reads the scores once (their neighbours from L1) and writes a byte;
// - cpg_compare reads the label; in a tile whose labels differ it takes, for each class that occurs there, an exp for
//   each pixel near an edge, and 4 (2r + 1)^2 products for each edge;
// - dense_backward reads C logits and stats, takes C exps, and writes C gradients;
// - sparse_backward reads the label; in a tile whose labels differ it does the work of cpg_compare, as many products
//   again for each pixel near an edge, and for those pixels all the work of dense_backward, entry by entry.
// Logits of another size come from L1, four for each class and stack. Their gradients are summed up by tiles in shared
// memory, so that (1 + H / 8h) (1 + W / 32w) times as many numbers as logits are written and read once more, in fp32.
#pragma once

#include "bcl.cuh"
#include "cpg.cuh"
#include "logits.cuh"
#include "select.cuh"

namespace bcmf::device {

// The rows of the table of partial sums (sums, tiles): first those of dense_forward, which are listed here, of which
// ohem_sum writes the first two anew; then two for each of BCL's steps, then CPG's two.
enum Sum : int { kNumerator, kCount, kHard, kValidPixels, kBadLabels, kForwardSums };

// Finds m and the sum of exp(z - m) over the classes of a stack, reading the logits once: the sum is scaled down
// whenever m grows.
template <typename Source, typename Acc>
__device__ __forceinline__ void sum_exps(const Source& source, int C, Acc (&m)[kStack], Acc (&sum)[kStack]) {
#pragma unroll
  for (int k = 0; k < kStack; ++k) m[k] = static_cast<Acc>(-INFINITY), sum[k] = 0;
  constexpr int kAtOnce = Source::kAtOnce;
  for_classes(source, C, [&](int, const Acc(&z)[kAtOnce][kStack]) {
#pragma unroll
    for (int k = 0; k < kStack; ++k) {
      Acc largest = m[k], exps = 0;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) largest = fmax(largest, z[j][k]);          // ignores NaN
      const Acc base = largest == static_cast<Acc>(-INFINITY) ? Acc(0) : largest;  // -inf - -inf would be NaN
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) exps += exp_of(z[j][k] - base);
      sum[k] = sum[k] * exp_of(m[k] - base) + exps;
      m[k] = largest;
    }
  });
}

// Writes stats, with OHEM the losses, with BCL the scores, and the tile's sums.
template <typename Source>
__global__ void __launch_bounds__(kThreads, 2)
    dense_forward(const __grid_constant__ LossArgs args, typename Source::Acc* scores, double* partials) {
  using Acc = typename Source::Acc;
  SharedCutter shared;
  const typename Source::Tile tile(args);
  const Source source(args, tile, Source::take(args, shared));
  const int64_t pixels = args.N * args.H * args.W;
  Acc m[kStack], log_sum[kStack], nll[kStack];
  int label[kStack];
  sum_exps(source, static_cast<int>(args.C), m, log_sum);
  double sums[kForwardSums] = {};
  const auto loss_of_class = [&](int k, int c) { return (m[k] - source.own(k, c)) + log_sum[k]; };
  tile.for_each([&](int k) {
    log_sum[k] = log(log_sum[k]);
    label[k] = read_label(args, tile.n, tile.y(k), tile.x(k));
    // A bad label makes the loss NaN: an assert would end the process, and an error would let the host wait for it.
    nll[k] = label[k] >= 0 ? loss_of_class(k, label[k]) : static_cast<Acc>(label[k] == kBad ? nan("") : -1);
    if (label[k] == kIgnored) return;
    const Acc w = label[k] >= 0 ? weight_of<Acc>(args, label[k]) : Acc(1);
    sums[kNumerator] += w * nll[k];
    sums[kCount] += w;
    sums[kHard] += key_of(nll[k]) >= key_of(static_cast<Acc>(args.ohem_cutoff));
    sums[kValidPixels] += 1;
    sums[kBadLabels] += label[k] == kBad;
  });
  tile.store(m, static_cast<Acc*>(args.stats));
  tile.store(log_sum, static_cast<Acc*>(args.stats) + pixels);
  if (args.ohem) tile.store(nll, static_cast<Acc*>(args.nll));
  for (int s = 0; s < args.bcl_steps; ++s) {
    Acc q[kStack];
    tile.for_each([&](int k) {
      q[k] = label[k] < 0 ? Acc(-1)
                          : score_of(
                                args, s, tile, tile.y(k), tile.x(k), label[k], nll[k],
                                [&](int c) { return loss_of_class(k, c); });
    });
    tile.store(q, scores + s * pixels);
  }
  store_partials(sums, partials);
}

using Count = unsigned long long;  // of pixels in the batch

// Begins OHEM's selection: finds how many of the largest losses to look for, which is 0 if enough pixels are above the
// threshold.
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

// Counts the digits of losses that have the prefix. It takes few blocks, because each adds all its counters to the
// histogram of all.
template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    ohem_count(const __grid_constant__ LossArgs args, const Selection<Acc>* selection, int level, Count* histogram) {
  if (selection->rank == 0) return;
  BCMF_SHARED(unsigned, counts, kDigits);
  for (int digit = threadIdx.x; digit < kDigits; digit += kThreads) counts[digit] = 0;
  __syncthreads();
  const auto prefix = selection->prefix;
  const int64_t pixels = args.N * args.H * args.W, step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t pixel = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; pixel < pixels; pixel += step) {
    const Acc nll = static_cast<const Acc*>(args.nll)[pixel];
    const int digit = nll == -1 ? -1 : digit_of<Acc>(key_of(nll), prefix, level);
    if (digit >= 0) atomicAdd(&counts[digit], 1u);
  }
  __syncthreads();
  for (int digit = threadIdx.x; digit < kDigits; digit += kThreads)
    if (counts[digit] > 0) atomicAdd(&histogram[digit], Count{counts[digit]});
}

// Adds the digit of the loss that is looked for to the prefix, and empties the histogram. One block runs it.
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

// Once the cutoff is known, replaces the partial sums over all valid pixels by those over the kept ones: of w * nll,
// and of their number.
template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    ohem_sum(const __grid_constant__ LossArgs args, const Selection<Acc>* selection, double* partials) {
  const Acc exceeds = static_cast<Acc>(args.ohem_cutoff);
  const bool found = selection->rank > 0 && selection->prefix < key_of(exceeds);
  const Acc cutoff = found ? loss_of<Acc>(selection->prefix) : exceeds;
  double sums[2] = {};
  const Stacks<false> tile(args);
  tile.for_each([&](int k) {
    const Acc nll = static_cast<const Acc*>(args.nll)[tile.pixel(k)];
    if (nll == -1 || key_of(nll) < key_of(cutoff)) return;
    const int label = read_label(args, tile.n, tile.y(k), tile.x(k));
    sums[0] += (label >= 0 ? weight_of<Acc>(args, label) : Acc(1)) * nll;
    sums[1] += 1;
  });
  store_partials(sums, partials);
  if (blockIdx.x == 0 && threadIdx.x == 0) static_cast<Acc*>(args.summary)[kCutoff] = cutoff;
}

// Finds the means from the totals of all partial sums. A bad label makes all of them NaN. One thread runs it.
template <typename Acc>
__global__ void loss_finish(const __grid_constant__ LossArgs args, const double* totals) {
  const auto ratio = [](double numerator, double count) { return count != 0 ? numerator / count : 0; };
  const double valid = totals[kValidPixels], bad = totals[kBadLabels] > 0 ? nan("") : 0;
  Acc* summary = static_cast<Acc*>(args.summary);
  const Acc cutoff = args.ohem && valid > 0 ? summary[kCutoff] : Acc(0);  // ohem_sum wrote it
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

// Returns the derivative of the total by the cross-entropy of a pixel whose weight is 1.
template <typename Acc>
__device__ __forceinline__ Acc ce_scale(const LossArgs& args) {
  const Acc denominator = static_cast<const Acc*>(args.summary)[kDenominator];
  return denominator != 0 ? *static_cast<const Acc*>(args.grad_total) / denominator : Acc(0);
}

// Returns the pull of the cross-entropy and BCL on p of a pixel, towards its label. It is exactly 0 where neither
// selects the pixel.
template <typename Acc, typename F>
__device__ __forceinline__ Acc pull_of(const LossArgs& args, int64_t pixel, int label, Acc scale, F loss_of_class) {
  const Acc* summary = static_cast<const Acc*>(args.summary);
  if (label < 0) return label == kBad ? static_cast<Acc>(nan("")) : Acc(0);
  Acc pull = args.ce ? scale * weight_of<Acc>(args, label) : Acc(0);
  // The loss has the forward's bits, so that the same pixels are kept, those at the cutoff too.
  if (args.ohem && key_of(loss_of_class(label)) < key_of(summary[kCutoff])) pull = 0;
  if (args.bcl_steps > 0 && !args.bcl_flipped) {
#pragma unroll 1
    for (unsigned steps = steps_of(args, pixel); steps != 0; steps &= steps - 1)
      pull += bcl_scale<Acc>(args, summary[kSelected + __ffs(static_cast<int>(steps)) - 1]);
  }
  return pull;
}

// The dense gradient of a stack: the factor times p, minus the pull at the label. It is exactly 0 where both are. Here
// the factor is the pull: what CPG and flipped labels change about it is for sparse_backward, which adds that, or, to
// round once, writes the pixel's gradients again.
template <typename Source>
struct Pulls {
  using Acc = typename Source::Acc;
  Acc m[kStack] = {}, log_sum[kStack] = {}, pull[kStack] = {};
  int label[kStack] = {};

  __device__ __forceinline__ Pulls(const LossArgs& args, const typename Source::Tile& tile, const Source& source) {
    tile.load(static_cast<const Acc*>(args.stats), m);
    tile.load(static_cast<const Acc*>(args.stats) + args.N * args.H * args.W, log_sum);
    const Acc scale = ce_scale<Acc>(args);
    tile.for_each([&](int k) {
      label[k] = read_label(args, tile.n, tile.y(k), tile.x(k));
      pull[k] = pull_of<Acc>(args, tile.pixel(k), label[k], scale,
                             [&](int c) { return (m[k] - source.own(k, c)) + log_sum[k]; });
    });
  }
  __device__ __forceinline__ Acc probability(int k, Acc z) const { return exp_of((z - m[k]) - log_sum[k]); }
  __device__ __forceinline__ Acc of(int k, int c, Acc p) const {
    const Acc product = pull[k] != 0 ? pull[k] * p : Acc(0);  // 0 * NaN of an ignored pixel is 0 here
    return c == label[k] ? product - pull[k] : product;
  }
};

// Writes the gradients of the cross-entropy and of BCL (without its flipped labels) for each label pixel, class by
// class.
template <typename Source, typename Sink>
__global__ void __launch_bounds__(kThreads, Source::kBlocks)
    dense_backward(const __grid_constant__ LossArgs args, Sink sink) {
  using Acc = typename Source::Acc;
  SharedCutter shared;
  const typename Source::Tile tile(args);
  const Source source(args, tile, Source::take(args, shared));
  sink.begin(args, tile, shared.take<Acc>(Sink::scratch()));
  const Pulls<Source> pulls(args, tile, source);
  const int C = static_cast<int>(args.C);
  constexpr int kAtOnce = Source::kAtOnce;
  for_classes(source, C, [&](int first, Acc(&z)[kAtOnce][kStack]) {
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (first + j >= C) break;
#pragma unroll
      for (int k = 0; k < kStack; ++k) z[j][k] = pulls.of(k, first + j, pulls.probability(k, z[j][k]));
      sink.put(args, source, tile, first + j, z[j]);
    }
  });
  sink.finish(source);
}

// The shared memory of sparse_backward, and the list of pixels that it works on. The host makes one to see how many
// bytes it takes.
template <typename Acc, typename Sink>
struct SparseMemory {
  static constexpr int kPixels = kRows * kColumns;
  SharedCutter shared;
  Window<Acc> window;
  Acc* scratch;          // of the sink
  uint16_t* places;      // row * kColumns + column of each listed pixel
  Acc *factors, *pulls;  // of each listed pixel: its gradient is p (factor + b) - pull at the label - flipped pulls
  Acc* kept;             // b of the first classes that the tile holds, by class and listed pixel
  int count;             // how many pixels are listed
  int kept_count;        // for how many classes b is kept

  BCMF_HOST_DEVICE explicit SparseMemory(const LossArgs& args)
      : window(args, args.cpg_radius, shared),
        scratch(shared.take<Acc>(Sink::scratch())),
        places(shared.take<uint16_t>(kPixels)),
        factors(shared.take<Acc>(kPixels)),
        pulls(shared.take<Acc>(kPixels)),
        kept(shared.take<Acc>(kPixels)),
        count(0),
        kept_count(0) {}

  // Lists the pixels for which wanted(row, column) is true, in order. All threads of the block call it.
  template <typename F>
  __device__ __forceinline__ void list(const Tile& tile, F wanted) {
    constexpr int kOwn = kPixels / kThreads;
    const int first = static_cast<int>(threadIdx.x) * kOwn;
    unsigned bits = 0;
    for (int i = 0; i < kOwn; ++i) {
      const int row = (first + i) / kColumns, column = (first + i) % kColumns;
      if (row < tile.rows && column < tile.columns && wanted(row, column)) bits |= 1u << i;
    }
    int before = scan_block(__popc(bits), &count);
    for (int i = 0; i < kOwn; ++i)
      if (bits >> i & 1) places[before++] = static_cast<uint16_t>(first + i);
    kept_count = count > 0 ? kPixels / count : 0;
    __syncthreads();
  }
  // Calls f(i, row, column) for the listed pixels. A pixel is always visited by the same thread.
  template <typename F>
  __device__ __forceinline__ void for_each(F f) const {
    for (int i = threadIdx.x; i < count; i += kThreads) f(i, places[i] / kColumns, places[i] % kColumns);
  }
};

// Writes the gradient of the few pixels that are near CPG's edges or that BCL selected by flipped labels. A sink that
// adds is given the part that dense_backward leaves out; any other one is given the whole gradient of these pixels,
// which replaces that of dense_backward. The steps cpg_edges, cpg_residuals and cpg_shares are part of this kernel.
template <typename Entries, typename Sink>
__global__ void __launch_bounds__(kThreads, 3) sparse_backward(const __grid_constant__ LossArgs args, Sink sink) {
  using Acc = typename Entries::Acc;
  const Tile tile(args);
  const Entries entries(args);
  SparseMemory<Acc, Sink> memory(args);
  Window<Acc>& window = memory.window;
  const auto selected_at = [&](int row, int column) -> unsigned {
    const int64_t pixel = (tile.n * tile.H + tile.top + row) * tile.W + tile.left + column;
    return args.bcl_flipped ? steps_of(args, pixel) : 0;
  };
  const auto p_of = [&](int row, int column, int c) {
    const int y = tile.top + row, x = tile.left + column;
    const Acc* m = static_cast<const Acc*>(args.stats) + (tile.n * tile.H + y) * tile.W + x;
    return exp_of((entries.at(tile.n, y, x, c) - m[0]) - m[args.N * args.H * args.W]);
  };
  const bool edges = args.cpg_radius > 0 && window.load(args, tile);
  if (!edges && !args.bcl_flipped) return;
  memory.list(tile, [&](int row, int column) {
    return (edges && window.is_near(row, column)) || selected_at(row, column) != 0;
  });
  if (memory.count == 0) return;
  sink.begin(args, tile, memory.scratch);
  sink.clear();
  memory.for_each([&](int i, int row, int column) {
    const int y = tile.top + row, x = tile.left + column;
    const int64_t pixel = (tile.n * tile.H + y) * tile.W + x;
    const Acc* m = static_cast<const Acc*>(args.stats) + pixel;
    const auto loss = [&](int c) { return (m[0] - entries.at(tile.n, y, x, c)) + m[args.N * args.H * args.W]; };
    memory.pulls[i] =
        Sink::kAdds ? Acc(0) : pull_of<Acc>(args, pixel, read_label(args, tile.n, y, x), ce_scale<Acc>(args), loss);
    memory.factors[i] = memory.pulls[i] + flipped_pull<Acc>(args, selected_at(row, column));
  });
  const int C = static_cast<int>(args.C);
  int held = 0;  // how many of the classes before c the tile holds
  for (int c = 0; c < C && edges; ++c) {
    if (!window.holds(c)) continue;
    window.cpg_residuals(args, tile, entries, c);
    memory.for_each([&](int i, int row, int column) {
      const Acc b = window.b_at(tile, row, column);
      if (held < memory.kept_count) memory.kept[held * memory.count + i] = b;
      // The factor loses the pixel's share. Where b is 0 nothing is compared, and p may be NaN.
      if (b != 0) memory.factors[i] -= p_of(row, column, c) * b;
    });
    ++held;
  }
  const auto value_of = [&](int i, int y, int x, int label, unsigned selected, int c, Acc p, Acc b) {
    const Acc factor = memory.factors[i];
    Acc value = factor != 0 ? factor * p : Acc(0);
    if (c == label) value -= memory.pulls[i];
    if (selected != 0) value -= flipped_pull_of<Acc>(args, selected, tile, y, x, c);
    return b != 0 ? value + p * b : value;
  };
  if (!Sink::kAdds && held <= memory.kept_count) {
    // All b are kept: no residual is needed again, and threads go from pixel to pixel without a barrier.
    constexpr int kAtOnce = 4;
    memory.for_each([&](int i, int row, int column) {
      const int y = tile.top + row, x = tile.left + column, label = read_label(args, tile.n, y, x);
      const unsigned selected = selected_at(row, column);
      const Acc* m = static_cast<const Acc*>(args.stats) + (tile.n * tile.H + y) * tile.W + x;
      const Acc max_logit = m[0], log_sum = m[args.N * args.H * args.W];
      int before = 0;  // how many of the classes before c the tile holds
      for (int first = 0; first < C; first += kAtOnce) {
        Acc z[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) z[j] = entries.at(tile.n, y, x, first + j < C ? first + j : C - 1);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const int c = first + j;
          if (c >= C) break;
          const bool holds = edges && window.holds(c);
          const Acc b = holds ? memory.kept[before * memory.count + i] : Acc(0);
          const Acc p = exp_of((z[j] - max_logit) - log_sum);
          sink.set(tile, row, column, c, value_of(i, y, x, label, selected, c, p, b));
          before += holds;
        }
      }
    });
    return;
  }
  held = 0;
  for (int c = 0; c < C; ++c) {
    const bool holds = edges && window.holds(c), kept = held < memory.kept_count;
    if (holds && !kept) window.cpg_residuals(args, tile, entries, c);
    memory.for_each([&](int i, int row, int column) {
      const int y = tile.top + row, x = tile.left + column;
      Acc b = 0;
      if (holds) b = kept ? memory.kept[held * memory.count + i] : window.b_at(tile, row, column);
      const int label = Sink::kAdds ? kIgnored : read_label(args, tile.n, y, x);  // its pulls are in dense_backward
      sink.set(tile, row, column, c, value_of(i, y, x, label, selected_at(row, column), c, p_of(row, column, c), b));
    });
    sink.add(args, tile, c);
    held += holds;
  }
}

}  // namespace bcmf::device
