// OHEM: the smallest loss that is kept is found by radix select (common/select.h), and the sums over the kept pixels
// replace those over all valid ones.
#pragma once

#include "common/select.h"
#include "cuda/kernels/finish.cuh"
#include "cuda/kernels/marks.cuh"

namespace bcmf::device {

using Count = unsigned long long;  // of pixels in the batch

// Begins OHEM's selection: finds how many of the largest losses to look for, which is 0 if enough pixels are above the
// threshold.
template <typename Acc>
__global__ void __launch_bounds__(kThreads) ohem_begin(const __grid_constant__ LossArgs args, const double* partials,
                                                       int64_t tiles, Selection<Acc>* selection, Count* histogram) {
  const double hard = load_partials(partials + kHard * tiles, tiles);
  const double valid = load_partials(partials + (kSumRows + kValidPixels) * tiles, tiles);
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
  for (int64_t first = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; first < pixels;
       first += kStack * step) {
    Acc nll[kStack];  // whose reads are under way at the same time
#pragma unroll
    for (int k = 0; k < kStack; ++k)
      nll[k] = first + k * step < pixels ? static_cast<const Acc*>(args.nll)[first + k * step] : Acc(-1);
#pragma unroll
    for (int k = 0; k < kStack; ++k) {
      const int digit = nll[k] == -1 ? -1 : digit_of<Acc>(key_of(nll[k]), prefix, level);
      if (digit >= 0) atomicAdd(&counts[digit], 1u);
    }
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
    ohem_sum(const __grid_constant__ LossArgs args, const __grid_constant__ Marks marks,
             const Selection<Acc>* selection, double* partials) {
  const Acc exceeds = static_cast<Acc>(args.ohem_cutoff);
  const bool found = selection->rank > 0 && selection->prefix < key_of(exceeds);
  const Acc cutoff = found ? loss_of<Acc>(selection->prefix) : exceeds;
  double sums[2] = {};
  const Stacks<false> tile(args);
  tile.for_each([&](int k) {
    const Acc nll = static_cast<const Acc*>(args.nll)[tile.pixel(k)];
    if (nll == -1 || key_of(nll) < key_of(cutoff)) return;
    const int label = marks.id(tile.pixel(k));
    sums[0] += (label >= 0 ? weight_of<Acc>(args, label) : Acc(1)) * nll;
    sums[1] += 1;
  });
  store_partials(sums, partials + (kSumRows + kCeSum) * static_cast<int64_t>(gridDim.x));
  if (blockIdx.x == 0 && threadIdx.x == 0) *static_cast<Acc*>(args.cutoff) = cutoff;
}

}  // namespace bcmf::device
