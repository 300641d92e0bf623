// The CUDA kernels of bcmf::loss. A tile is kTilePixels consecutive pixels of the batch, one block each; a thread owns
// a pixel at a time and walks its classes, so that a warp reads 32 neighbouring pixels of one class plane.
//
// Per pixel, S bytes a logit: the forward reads C logits twice (the second time from L1 or L2) and takes C exps, the
// backward reads C logits, takes C exps and writes C gradients. Bytes from DRAM: 3 C S + 16 (stats written and read) +
// labels; OHEM adds 4 written and 4 read (levels + 1) times.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "common.cuh"
#include "launch.cuh"
#include "select.cuh"

namespace bcmf::device {

constexpr int kThreads = 256;
constexpr int kTilePixels = 1024;

template <typename Scalar>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};

// Explicit conversions: torch's build switches the implicit ones off.
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ void narrow(float x, __half* to) { *to = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, float* to) { *to = x; }
__device__ __forceinline__ void narrow(double x, double* to) { *to = x; }

struct Pixel {
  int64_t n, y, x;
};
__device__ __forceinline__ Pixel pixel_at(const LossArgs& args, int64_t index) {
  const int64_t row = index / args.W;
  return {row / args.H, row % args.H, index % args.W};
}
__device__ __forceinline__ int64_t offset_of(const LogitView& v, const Pixel& at) {
  return at.n * v.stride_n + at.y * v.stride_h + at.x * v.stride_w;
}

// Sum over the block in a fixed order, for every thread. `shared` holds kThreads entries.
template <typename T>
__device__ __forceinline__ T block_sum(T value, T* shared) {
  shared[threadIdx.x] = value;
  __syncthreads();
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  const T sum = shared[0];
  __syncthreads();  // `shared` may be written again
  return sum;
}

// Adds two values of the tile's threads up and stores the sums: partials[tile], partials[tiles + tile].
__device__ __forceinline__ void store_partials(double first, double second, double* partials) {
  BCMF_SHARED(double, shared, kThreads);
  first = block_sum(first, shared);
  second = block_sum(second, shared);
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = first;
    partials[gridDim.x + blockIdx.x] = second;
  }
}

// Adds the partial sums of all tiles up, each thread a fixed subset in index order. By one block.
__device__ __forceinline__ void load_partials(const double* partials, int64_t tiles, double* first, double* second) {
  BCMF_SHARED(double, shared, kThreads);
  double a = 0, b = 0;
  for (int64_t tile = threadIdx.x; tile < tiles; tile += kThreads) {
    a += partials[tile];
    b += partials[tiles + tile];
  }
  *first = block_sum(a, shared);
  *second = block_sum(b, shared);
}

// f(index) for the pixels of the block's tile.
template <typename F>
__device__ __forceinline__ void for_pixels_of_tile(const LossArgs& args, F f) {
  const int64_t pixels = args.N * args.H * args.W;
  for (int k = threadIdx.x; k < kTilePixels; k += kThreads) {
    const int64_t index = blockIdx.x * static_cast<int64_t>(kTilePixels) + k;
    if (index < pixels) f(index);
  }
}

template <typename Acc>
__device__ __forceinline__ Acc weight_of(const LossArgs& args, int label) {
  return args.weight ? static_cast<const Acc*>(args.weight)[label] : Acc(1);
}

// Writes stats, and partial sums of w * nll and of w; with OHEM nll, and partial counts of hard and of valid pixels.
template <typename Scalar>
__global__ void __launch_bounds__(kThreads) loss_forward_tiles(LossArgs args, double* partials) {
  using Acc = typename AccOf<Scalar>::type;
  Acc* max_logit = static_cast<Acc*>(args.stats);
  Acc* log_sum = max_logit + args.N * args.H * args.W;

  double first = 0, second = 0;
  for_pixels_of_tile(args, [&](int64_t index) {
    const Pixel at = pixel_at(args, index);
    const Scalar* z = static_cast<const Scalar*>(args.logits.data) + offset_of(args.logits, at);

    Acc m = widen(z[0]);
    for (int64_t c = 1; c < args.C; ++c) {
      const Acc value = widen(z[c * args.logits.stride_c]);
      m = value > m ? value : m;
    }
    Acc sum = 0;
    for (int64_t c = 0; c < args.C; ++c) sum += exp(widen(z[c * args.logits.stride_c]) - m);
    const Acc log_of_sum = log(sum);
    max_logit[index] = m;
    log_sum[index] = log_of_sum;

    const int label = read_label(args, at.n, at.y, at.x);
    // A bad label: no assert, no look from the host; the loss says it.
    const Acc nll = label >= 0 ? (m - widen(z[label * args.logits.stride_c])) + log_of_sum
                               : static_cast<Acc>(label == kBad ? nan("") : -1);
    if (args.ohem) {
      static_cast<Acc*>(args.nll)[index] = nll;
      first += label != kIgnored && key_of(nll) >= key_of(static_cast<Acc>(args.ohem_cutoff));
      second += label != kIgnored;
    } else if (label != kIgnored) {
      const Acc w = label >= 0 ? weight_of<Acc>(args, label) : Acc(1);
      first += w * nll;
      second += w;
    }
  });
  store_partials(first, second, partials);
}

using Count = unsigned long long;  // of pixels of the batch

// OHEM, first step: how many of the largest losses to look for. None if enough pixels are above the threshold.
template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    ohem_begin(LossArgs args, const double* partials, int64_t tiles, Selection<Acc>* selection, Count* histogram) {
  double hard, valid;
  load_partials(partials, tiles, &hard, &valid);
  for (int digit = threadIdx.x; digit < kDigits; digit += kThreads) histogram[digit] = 0;
  if (threadIdx.x == 0) {
    const double kept = args.ohem_min_kept < valid ? static_cast<double>(args.ohem_min_kept) : valid;
    *selection = {0, hard >= kept ? 0 : static_cast<int64_t>(kept)};
  }
}

// Counts the digits of the tile's losses that have the prefix.
template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    ohem_count(LossArgs args, const Selection<Acc>* selection, int level, Count* histogram) {
  if (selection->rank == 0) return;
  BCMF_SHARED(unsigned, counts, kDigits);
  for (int digit = threadIdx.x; digit < kDigits; digit += kThreads) counts[digit] = 0;
  __syncthreads();
  const auto prefix = selection->prefix;
  for_pixels_of_tile(args, [&](int64_t index) {
    const Acc nll = static_cast<const Acc*>(args.nll)[index];
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

// With the cutoff known: partial sums of w * nll over the kept pixels, and their number.
template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    ohem_sum_tiles(LossArgs args, const Selection<Acc>* selection, double* partials) {
  const Acc exceeds = static_cast<Acc>(args.ohem_cutoff);
  const bool found = selection->rank > 0 && selection->prefix < key_of(exceeds);
  const Acc cutoff = found ? loss_of<Acc>(selection->prefix) : exceeds;
  double sum = 0, count = 0;
  for_pixels_of_tile(args, [&](int64_t index) {
    const Acc nll = static_cast<const Acc*>(args.nll)[index];
    if (nll == -1 || key_of(nll) < key_of(cutoff)) return;
    const Pixel at = pixel_at(args, index);
    const int label = read_label(args, at.n, at.y, at.x);
    sum += (label >= 0 ? weight_of<Acc>(args, label) : Acc(1)) * nll;
    count += 1;
  });
  store_partials(sum, count, partials);
  if (blockIdx.x == 0 && threadIdx.x == 0) static_cast<Acc*>(args.summary)[kCutoff] = cutoff;
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads) loss_finish(LossArgs args, const double* partials, int64_t tiles) {
  double numerator, denominator;
  load_partials(partials, tiles, &numerator, &denominator);
  if (threadIdx.x == 0) {
    Acc *summary = static_cast<Acc*>(args.summary), *terms = static_cast<Acc*>(args.terms);
    const Acc cutoff = args.ohem && tiles > 0 ? summary[kCutoff] : Acc(0);
    for (int entry = 0; entry < kSummarySize; ++entry) summary[entry] = 0;
    summary[kDenominator] = static_cast<Acc>(denominator);
    summary[kCutoff] = cutoff;
    for (int term = 0; term < kTerms; ++term) terms[term] = 0;
    terms[kCe] = static_cast<Acc>(denominator != 0 ? numerator / denominator : 0);
    *static_cast<Acc*>(args.total) = terms[kCe];
  }
}

template <typename Scalar>
__global__ void __launch_bounds__(kThreads) loss_backward_tiles(LossArgs args) {
  using Acc = typename AccOf<Scalar>::type;
  const Acc* max_logit = static_cast<const Acc*>(args.stats);
  const Acc* log_sum = max_logit + args.N * args.H * args.W;
  const Acc* summary = static_cast<const Acc*>(args.summary);
  const Acc denominator = summary[kDenominator], cutoff = summary[kCutoff];
  const Acc scale = denominator != 0 ? *static_cast<const Acc*>(args.grad_total) / denominator : Acc(0);

  for_pixels_of_tile(args, [&](int64_t index) {
    const Pixel at = pixel_at(args, index);
    const Scalar* z = static_cast<const Scalar*>(args.logits.data) + offset_of(args.logits, at);
    Scalar* grad = static_cast<Scalar*>(args.grad.data) + offset_of(args.grad, at);
    const Acc m = max_logit[index], log_of_sum = log_sum[index];

    const int label = read_label(args, at.n, at.y, at.x);
    Acc coefficient = label == kBad ? static_cast<Acc>(nan("")) : Acc(0);
    if (label >= 0) {
      // The forward's own arithmetic, so that the same pixels are kept.
      const Acc nll = (m - widen(z[label * args.logits.stride_c])) + log_of_sum;
      if (!args.ohem || key_of(nll) >= key_of(cutoff)) coefficient = scale * weight_of<Acc>(args, label);
    }
    for (int64_t c = 0; c < args.C; ++c) {
      const Acc p = exp((widen(z[c * args.logits.stride_c]) - m) - log_of_sum);
      const Acc value = coefficient != 0 ? coefficient * (p - (c == label ? Acc(1) : Acc(0))) : Acc(0);
      narrow(value, grad + c * args.grad.stride_c);
    }
  });
}

}  // namespace bcmf::device
