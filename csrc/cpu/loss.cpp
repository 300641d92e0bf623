#include "loss.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <algorithm>
#include <mutex>
#include <vector>

#include "../device/select.cuh"
#include "loss_kernel.h"

namespace bcmf::cpu {
namespace {

// torch's own choice, so that ATEN_CPU_CAPABILITY speaks for these kernels too.
const LossKernels& kernels() {
#if defined(__x86_64__)
  static const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return loss_kernels_avx512;
  if (capability == "AVX2") return loss_kernels_avx2;
#endif
  return loss_kernels_baseline;
}

size_t acc_size(const LossArgs& args) { return args.logits.type == LogitType::f64 ? sizeof(double) : sizeof(float); }

template <typename F>
void for_tiles(const LossArgs& args, F run) {
  const int64_t tiles = args.N * tiles_per_image(args);
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<char> scratch(scratch_size(args) * acc_size(args) + 63);
    const auto aligned = (reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64;
    run(begin, end, reinterpret_cast<void*>(aligned));
  });
}

// The rank-th largest of the losses that are not -1, by radix select.
template <typename Acc>
Acc find_loss(const Acc* losses, int64_t count, int64_t rank) {
  Selection<Acc> selection = {0, rank};
  for (int level = 0; level < kLevels<Acc>; ++level) {
    std::vector<int64_t> histogram(kDigits);
    std::mutex merging;  // of integers: the order does not matter
    at::parallel_for(0, count, 1 << 16, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> counts(kDigits);
      for (int64_t i = begin; i < end; ++i) {
        const int digit = losses[i] == -1 ? -1 : digit_of<Acc>(key_of(losses[i]), selection.prefix, level);
        if (digit >= 0) ++counts[digit];
      }
      const std::lock_guard<std::mutex> lock(merging);
      for (int digit = 0; digit < kDigits; ++digit) histogram[digit] += counts[digit];
    });
    int digit = kDigits - 1;
    while (selection.rank > histogram[digit]) selection.rank -= histogram[digit--];
    selection.prefix |= static_cast<typename KeyOf<Acc>::type>(digit) << digit_shift<Acc>(level);
  }
  return loss_of<Acc>(selection.prefix);
}

// The smallest loss that OHEM keeps: what exceeds the threshold, or the min_kept-th largest if those are too few.
template <typename Acc>
Acc find_cutoff(const LossArgs& args, int64_t hard, int64_t valid) {
  const Acc exceeds = static_cast<Acc>(args.ohem_cutoff);
  const int64_t kept = std::min(args.ohem_min_kept, valid);
  if (hard >= kept) return exceeds;
  return find_loss(static_cast<const Acc*>(args.nll), args.N * args.H * args.W, kept);
}

// Sums of w * nll and the number of the kept pixels, by tiles of a fixed size.
template <typename Acc>
void sum_kept(const LossArgs& args, Acc cutoff, double* sum, int64_t* kept) {
  constexpr int64_t kTile = 4096;
  const int64_t pixels = args.N * args.H * args.W, tiles = (pixels + kTile - 1) / kTile;
  const Acc* nlls = static_cast<const Acc*>(args.nll);
  const Acc* weight = static_cast<const Acc*>(args.weight);
  std::vector<double> sums(tiles);
  std::vector<int64_t> counts(tiles);
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kTile; i < std::min(end * kTile, pixels); ++i) {
      if (nlls[i] == -1 || key_of(nlls[i]) < key_of(cutoff)) continue;
      const int64_t row = i / args.W;
      const Acc w = weight ? weight[read_label(args, row / args.H, row % args.H, i % args.W)] : 1;
      sums[i / kTile] += w * nlls[i];
      ++counts[i / kTile];
    }
  });
  *sum = 0, *kept = 0;
  for (const double s : sums) *sum += s;
  for (const int64_t c : counts) *kept += c;
}

template <typename Acc>
void finish(const LossArgs& args, const LossPartial& sum) {
  double numerator = sum.weighted_nll, denominator = sum.weight;
  Acc cutoff = 0;
  if (args.ohem) {
    cutoff = find_cutoff<Acc>(args, sum.hard, sum.valid);
    int64_t kept;
    sum_kept(args, cutoff, &numerator, &kept);
    denominator = static_cast<double>(kept);
  }
  static_cast<Acc*>(args.summary)[kDenominator] = static_cast<Acc>(denominator);
  static_cast<Acc*>(args.summary)[kCutoff] = cutoff;
  *static_cast<Acc*>(args.total) = static_cast<Acc>(denominator != 0 ? numerator / denominator : 0);
}

}  // namespace

const char* loss_capability() {
  const LossKernels* k = &kernels();
#if defined(__x86_64__)
  if (k == &loss_kernels_avx512) return "AVX512";
  if (k == &loss_kernels_avx2) return "AVX2";
#endif
  return "baseline";
}

int64_t loss_forward(const LossArgs& args) {
  std::vector<LossPartial> partials(args.N * tiles_per_image(args));
  for_tiles(args, [&](int64_t begin, int64_t end, void* scratch) {
    kernels().forward(args, begin, end, scratch, partials.data());
  });
  LossPartial sum = {};
  for (const LossPartial& partial : partials) {
    sum.weighted_nll += partial.weighted_nll;
    sum.weight += partial.weight;
    sum.hard += partial.hard;
    sum.valid += partial.valid;
    sum.bad_labels += partial.bad_labels;
  }
  if (sum.bad_labels == 0) args.logits.type == LogitType::f64 ? finish<double>(args, sum) : finish<float>(args, sum);
  return sum.bad_labels;
}

void loss_backward(const LossArgs& args) {
  for_tiles(args, [&](int64_t begin, int64_t end, void* scratch) { kernels().backward(args, begin, end, scratch); });
}

}  // namespace bcmf::cpu
