// The kernels of bcmf::srm. Maps are in channels_last: neighbouring threads work on neighbouring channels of a pixel.
//
// The backward adds up the gradient of `low` without atomics on floats: srm_list sorts the pixels of an image by the
// first entry that they read (their cell), those of a cell by their number, and srm_low adds up the lists in this
// order.
#pragma once

#include "common/srm.h"
#include "cuda/kernels/tile.cuh"

namespace bcmf::device {

constexpr int kSrmPixels = kWarp;   // of a block
constexpr int kListedCells = 1024;  // of a block of srm_list
constexpr int kSummedCells = 16;    // of a row, of a warp of srm_low

// What a pixel reads of `low`.
template <typename Acc>
struct SrmReads {
  WarpTaps<Acc> x, y;
};
// The same, as srm_pulls leaves it: the number of the first entry in its image, and the weights.
template <typename Acc>
struct KeptReads {
  int cell;
  Acc x[WarpTaps<Acc>::kMost], y[WarpTaps<Acc>::kMost];
};

// The least and the largest cell of some pixels.
struct CellBounds {
  int least, largest;
};

// What srm_pulls leaves for the kernels behind it, and they for each other.
template <typename Acc>
struct SrmScratch {
  KeptReads<Acc>* reads;  // (N, H * W)
  Acc* pulls;             // (N, H * W, 2): derivatives of the total by the pixel's position
  Acc* weights;           // (kNeighbours, N, H * W): of the neighbours' offsets
  CellBounds* bounds;     // (N, chunks_of): of kSrmPixels pixels each
  int* listed;            // (N, H * W): pixels by cell
  int* starts;            // (N, h * w + 1): where the pixels of each cell begin in `listed`
};
BCMF_HOST_DEVICE int64_t chunks_of(const SrmArgs& args) { return (args.H * args.W + kSrmPixels - 1) / kSrmPixels; }
BCMF_HOST_DEVICE int64_t ranges_of(const SrmArgs& args) { return (args.h * args.w + kListedCells - 1) / kListedCells; }

// kSide neighbouring channels, which are read and written at once.
template <typename Scalar, int kSide, typename Acc>
__device__ __forceinline__ void load_side(const Scalar* from, Acc (&to)[kSide]) {
  if constexpr (kSide == 1)
    to[0] = widen(*from);
  else if constexpr (sizeof(Scalar) == sizeof(double))
    load_pack(from, to);
  else
    load_widened(from, to);
}
template <typename Scalar, int kSide, typename Acc>
__device__ __forceinline__ void store_side(const Acc (&from)[kSide], Scalar* to) {
  if constexpr (kSide == 1)
    narrow(from[0], to);
  else if constexpr (sizeof(Scalar) == sizeof(double))
    store_pack(from, to);
  else
    store_narrowed(from, to);
}

// The offsets of a pixel.
template <typename Scalar>
struct SrmPixel {
  using Acc = typename AccOf<Scalar>::type;
  int n, y, x;
  Acc given[kNeighbours][kOffsets], weight[kNeighbours], mixed[kOffsets];

  // index: of the batch.
  __device__ __forceinline__ SrmPixel(const SrmArgs& args, int64_t index)
      : n(static_cast<int>(index / (args.H * args.W))),
        y(static_cast<int>(index / args.W % args.H)),
        x(static_cast<int>(index % args.W)),
        mixed{} {
    Acc largest = lowest<Acc>(), sum = 0;
    const int H = static_cast<int>(args.H), W = static_cast<int>(args.W);
#pragma unroll
    for (int q = 0; q < kNeighbours; ++q) {
      const int64_t neighbour = (int64_t{n} * H + clamp(y + q / 3 - 1, H)) * W + clamp(x + q % 3 - 1, W);
#pragma unroll
      for (int axis = 0; axis < kOffsets; ++axis) given[q][axis] = raw_at(args, neighbour * kRaw + axis);
      weight[q] = raw_at(args, index * kRaw + kOffsets + q);
      largest = fmax(largest, weight[q]);  // ignores NaN, which the sum shows
    }
#pragma unroll
    for (int q = 0; q < kNeighbours; ++q) weight[q] = exp_of(weight[q] - largest), sum += weight[q];
#pragma unroll
    for (int q = 0; q < kNeighbours; ++q) {
      weight[q] /= sum;
#pragma unroll
      for (int axis = 0; axis < kOffsets; ++axis) mixed[axis] += weight[q] * given[q][axis];
    }
  }
  __device__ __forceinline__ SrmReads<Acc> reads(const SrmArgs& args) const {
    return {taps(static_cast<Acc>(x) + mixed[0], args.w, args.W), taps(static_cast<Acc>(y) + mixed[1], args.h, args.H)};
  }

 private:
  static __device__ __forceinline__ Acc raw_at(const SrmArgs& args, int64_t i) {
    return args.raw_type == args.type ? widen(static_cast<const Scalar*>(args.raw)[i])
                                      : static_cast<const Acc*>(args.raw)[i];
  }
  static __device__ __forceinline__ WarpTaps<Acc> taps(Acc position, int64_t in, int64_t out) {
    const WarpPosition<Acc> at = warp_position(position, static_cast<int>(out));
    const int64_t next = at.before + 1 < out ? at.before + 1 : at.before;
    const AxisTap<Acc> lower = axis_tap<Acc>(at.before, in, out, false), upper = axis_tap<Acc>(next, in, out, false);
    return warp_taps(at, static_cast<int>(lower.first), lower.weight, static_cast<int>(upper.first), upper.weight);
  }
};

template <typename Scalar, typename Acc>
__device__ __forceinline__ void store_raw(const SrmArgs& args, int64_t i, Acc value) {
  if (args.raw_type == args.type)
    narrow(value, static_cast<Scalar*>(args.grad_raw) + i);
  else
    static_cast<Acc*>(args.grad_raw)[i] = value;
}

// Calls f(entry, a, b) for the entries of `low` that a pixel of image n reads, from channel c on: a is their row, b
// their column.
template <typename Scalar, typename Acc, typename F>
__device__ __forceinline__ void for_reads(const SrmArgs& args, int64_t n, int c, const SrmReads<Acc>& reads, F f) {
  const Scalar* row =
      static_cast<const Scalar*>(args.low) + ((n * args.h + reads.y.first) * args.w + reads.x.first) * args.C + c;
  for (int a = 0; a < reads.y.count; ++a, row += args.w * args.C) {
    const Scalar* entry = row;
    for (int b = 0; b < reads.x.count; ++b, entry += args.C) f(entry, a, b);
  }
}

template <typename Scalar, int kSide>
__global__ void __launch_bounds__(kThreads, 2) srm_forward(const __grid_constant__ SrmArgs args) {
  using Acc = typename AccOf<Scalar>::type;
  BCMF_SHARED(SrmReads<Acc>, reads, kSrmPixels);
  const int64_t first = blockIdx.x * int64_t{kSrmPixels}, left = args.N * args.H * args.W - first;
  const int count = left < kSrmPixels ? static_cast<int>(left) : kSrmPixels;
  if (threadIdx.x < count) reads[threadIdx.x] = SrmPixel<Scalar>(args, first + threadIdx.x).reads(args);
  __syncthreads();  // all pixels are known
  const int sides = static_cast<int>(args.C) / kSide;
  for (int i = threadIdx.x; i < count * sides; i += kThreads) {
    const int k = i / sides, c = i % sides * kSide;
    const int64_t at = (first + k) * args.C + c;
    Acc sum[kSide];
    load_side(static_cast<const Scalar*>(args.residual) + at, sum);
    for_reads<Scalar>(args, (first + k) / (args.H * args.W), c, reads[k], [&](const Scalar* entry, int a, int b) {
      const Acc weight = reads[k].y.weight[a] * reads[k].x.weight[b];
      if (weight == 0) return;  // what is there might be infinite
      Acc value[kSide];
      load_side(entry, value);
#pragma unroll
      for (int j = 0; j < kSide; ++j) sum[j] += weight * value[j];
    });
    store_side(sum, static_cast<Scalar*>(args.out) + at);
  }
}

// Writes the gradients of the logits in `raw`, and what the kernels behind it need of each pixel. A block works on a
// chunk of an image.
template <typename Scalar, int kSide>
__global__ void __launch_bounds__(kThreads, 2)
    srm_pulls(const __grid_constant__ SrmArgs args, SrmScratch<typename AccOf<Scalar>::type> scratch) {
  using Acc = typename AccOf<Scalar>::type;
  BCMF_SHARED(SrmReads<Acc>, reads, kSrmPixels);
  BCMF_SHARED(Acc, pulls, kSrmPixels * kOffsets);
  const int64_t chunks = chunks_of(args), n = blockIdx.x / chunks, in_image = blockIdx.x % chunks * kSrmPixels;
  const int64_t first = n * args.H * args.W + in_image, left = args.H * args.W - in_image;
  const int count = left < kSrmPixels ? static_cast<int>(left) : kSrmPixels;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const bool has = threadIdx.x < count;
  if (has) reads[threadIdx.x] = SrmPixel<Scalar>(args, first + threadIdx.x).reads(args);
  __syncthreads();  // all pixels are known
  for (int k = warp; k < count; k += kWarps) {
    Acc by_x = 0, by_y = 0;
    for (int c = lane * kSide; c < args.C; c += kWarp * kSide) {
      Acc upstream[kSide];
      load_side(static_cast<const Scalar*>(args.out) + (first + k) * args.C + c, upstream);
      for_reads<Scalar>(args, n, c, reads[k], [&](const Scalar* entry, int a, int b) {
        const Acc of_x = reads[k].y.weight[a] * reads[k].x.slope[b], of_y = reads[k].y.slope[a] * reads[k].x.weight[b];
        if (of_x == 0 && of_y == 0) return;
        Acc value[kSide], product = 0;
        load_side(entry, value);
#pragma unroll
        for (int j = 0; j < kSide; ++j) product += upstream[j] * value[j];
        by_x += of_x * product, by_y += of_y * product;
      });
    }
    by_x = sum_of_warp(by_x), by_y = sum_of_warp(by_y);
    if (lane == 0) pulls[k * kOffsets] = by_x, pulls[k * kOffsets + 1] = by_y;
  }
  __syncthreads();  // all pulls are there
  if (warp > 0) return;
  const SrmReads<Acc> own = reads[has ? lane : 0];
  const int cell = own.y.first * static_cast<int>(args.w) + own.x.first;
  int least = cell, largest = cell;
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const int one = __shfl_xor_sync(0xffffffffu, least, lanes), other = __shfl_xor_sync(0xffffffffu, largest, lanes);
    least = one < least ? one : least, largest = other > largest ? other : largest;
  }
  if (lane == 0) scratch.bounds[blockIdx.x] = {least, largest};
  if (!has) return;
  const Acc x = pulls[lane * kOffsets], y = pulls[lane * kOffsets + 1];
  const int64_t index = first + lane;
  const SrmPixel<Scalar> pixel(args, index);  // once more: kept till here, it would take the loops' registers
  scratch.reads[index] = {
      cell, {own.x.weight[0], own.x.weight[1], own.x.weight[2]}, {own.y.weight[0], own.y.weight[1], own.y.weight[2]}};
  scratch.pulls[index * kOffsets] = x, scratch.pulls[index * kOffsets + 1] = y;
  const Acc mean = x * pixel.mixed[0] + y * pixel.mixed[1];
#pragma unroll
  for (int q = 0; q < kNeighbours; ++q) {
    scratch.weights[q * args.N * args.H * args.W + index] = pixel.weight[q];
    store_raw<Scalar>(args, index * kRaw + kOffsets + q,
                      pixel.weight[q] * (x * pixel.given[q][0] + y * pixel.given[q][1] - mean));
  }
}

// Writes the gradients of the offsets in `raw`, each a sum over the pixels that have it as a neighbour's.
template <typename Scalar>
__global__ void __launch_bounds__(kThreads, 2)
    srm_offsets(const __grid_constant__ SrmArgs args, SrmScratch<typename AccOf<Scalar>::type> scratch) {
  using Acc = typename AccOf<Scalar>::type;
  const int64_t index = blockIdx.x * int64_t{kThreads} + threadIdx.x, pixels = args.N * args.H * args.W;
  if (index >= pixels) return;
  const int64_t y = index / args.W % args.H, x = index % args.W;
  Acc sums[kOffsets] = {};
  // Calls f(step) for where, along an axis, those are that have place i as their neighbour in direction d. A pixel at
  // the border also stands for the one beyond it.
  const auto for_sources = [](int64_t i, int d, int64_t length, auto f) {
    if (i - d >= 0 && i - d < length) f(-d);
    if (i + d < 0 || i + d >= length) f(0);
  };
#pragma unroll
  for (int q = 0; q < kNeighbours; ++q)
    for_sources(y, q / 3 - 1, args.H, [&](int down) {
      for_sources(x, q % 3 - 1, args.W, [&](int across) {
        const int64_t from = index + down * args.W + across;
        const Acc weight = scratch.weights[q * pixels + from];
        for (int axis = 0; axis < kOffsets; ++axis) sums[axis] += weight * scratch.pulls[from * kOffsets + axis];
      });
    });
  for (int axis = 0; axis < kOffsets; ++axis) store_raw<Scalar>(args, index * kRaw + axis, sums[axis]);
}

// Lists the pixels of kListedCells cells of an image. Each warp looks at a part of the image, and counts the pixels of
// each cell; the parts of a cell's list follow each other. counts: (kWarps, kListedCells).
template <typename Acc>
__global__ void __launch_bounds__(kThreads, 2)
    srm_list(const __grid_constant__ SrmArgs args, SrmScratch<Acc> scratch, SharedArray<int> shared) {
  const int64_t ranges = ranges_of(args), n = blockIdx.x / ranges, pixels = args.H * args.W;
  const int cells = static_cast<int>(args.h * args.w), begin = static_cast<int>(blockIdx.x % ranges) * kListedCells;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  int* counts = shared.data();
  for (int i = threadIdx.x; i < kWarps * kListedCells; i += kThreads) counts[i] = 0;
  __syncthreads();  // they are counted up
  int* own = counts + warp * kListedCells;
  const KeptReads<Acc>* reads = scratch.reads + n * pixels;
  const int chunks = static_cast<int>(chunks_of(args)), of_warp = (chunks + kWarps - 1) / kWarps;
  const int end = (warp + 1) * of_warp < chunks ? (warp + 1) * of_warp : chunks;
  int below = 0;  // pixels of this lane in cells before `begin`
  // Calls f(pixel, cell - begin, whether that is one of this block) for all pixels of the chunks that may have some,
  // in their order, by all lanes of the warp together.
  const auto for_chunks = [&](auto f) {
    for (int first = warp * of_warp; first < end; first += kWarp) {
      const int chunk = first + lane;
      const CellBounds bounds = chunk < end ? scratch.bounds[n * chunks + chunk] : CellBounds{cells, -1};
      const unsigned wanted =
          __ballot_sync(0xffffffffu, bounds.least < begin + kListedCells && bounds.largest >= begin);
      if (bounds.largest >= 0 && bounds.largest < begin)
        below += static_cast<int>(
            pixels - int64_t{chunk} * kSrmPixels < kSrmPixels ? pixels - int64_t{chunk} * kSrmPixels : kSrmPixels);
      for (unsigned left = wanted; left != 0; left &= left - 1) {
        const int64_t pixel = (int64_t{first} + __ffs(static_cast<int>(left)) - 1) * kSrmPixels + lane;
        const int cell = pixel < pixels ? reads[pixel].cell - begin : kListedCells;
        below += cell < 0;
        f(static_cast<int>(pixel), cell, cell >= 0 && cell < kListedCells);
      }
    }
  };
  for_chunks([&](int, int cell, bool here) {
    if (here) atomicAdd(reinterpret_cast<unsigned*>(own + cell), 1u);
  });
  const int before = below;  // the second walk counts them again
  BCMF_SHARED(int, sums, kWarps);
  const int of_warps = sum_of_warp(before);
  if (lane == 0) sums[warp] = of_warps;
  __syncthreads();  // all counts are there
  int start = 0;
  for (int i = 0; i < kWarps; ++i) start += sums[i];
  constexpr int kOwn = kListedCells / kThreads;
  int of_thread = 0, all = 0;
  for (int k = 0; k < kOwn; ++k)
    for (int i = 0; i < kWarps; ++i) of_thread += counts[i * kListedCells + threadIdx.x * kOwn + k];
  start += scan_block(of_thread, &all);
  for (int k = 0; k < kOwn; ++k) {
    const int cell = static_cast<int>(threadIdx.x) * kOwn + k;
    if (begin + cell <= cells) scratch.starts[n * (cells + 1) + begin + cell] = start;
    for (int i = 0; i < kWarps; ++i) {
      const int count = counts[i * kListedCells + cell];
      counts[i * kListedCells + cell] = start;
      start += count;
    }
  }
  if (threadIdx.x == kThreads - 1 && begin + kListedCells == cells) scratch.starts[n * (cells + 1) + cells] = start;
  __syncthreads();  // all places are known
  for_chunks([&](int pixel, int cell, bool here) {
    for (unsigned left = __ballot_sync(0xffffffffu, here); left != 0;) {
      const int next = __shfl_sync(0xffffffffu, cell, __ffs(static_cast<int>(left)) - 1);
      const unsigned same = __ballot_sync(0xffffffffu, cell == next);
      int place = 0;
      if (lane == 0) place = own[next], own[next] += __popc(same);
      place = __shfl_sync(0xffffffffu, place, 0);
      if (cell == next) scratch.listed[n * pixels + place + __popc(same & ((1u << lane) - 1))] = pixel;
      left &= ~same;
    }
  });
}

// How many warps of srm_low share the channels of a cell, the cells of a row, and how many there are.
template <int kSide>
BCMF_HOST_DEVICE int64_t parts_of(const SrmArgs& args) {
  return (args.C + kWarp * kSide - 1) / (kWarp * kSide);
}
BCMF_HOST_DEVICE int64_t pieces_of(const SrmArgs& args) { return (args.w + kSummedCells - 1) / kSummedCells; }
template <int kSide>
BCMF_HOST_DEVICE int64_t low_tasks(const SrmArgs& args) {
  return args.N * args.h * pieces_of(args) * parts_of<kSide>(args);
}

// Adds up the gradient of `low`. A warp goes along kSummedCells cells of a row, with kSide channels of each lane: the
// pixels of a cell reach it and the two cells to its right, and as many rows below.
template <typename Scalar, int kSide>
__global__ void __launch_bounds__(kThreads, 2)
    srm_low(const __grid_constant__ SrmArgs args, SrmScratch<typename AccOf<Scalar>::type> scratch) {
  using Acc = typename AccOf<Scalar>::type;
  constexpr int kMost = WarpTaps<Acc>::kMost;
  const int64_t parts = parts_of<kSide>(args), pieces = pieces_of(args);
  int64_t task = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarp;
  const int c = (static_cast<int>(task % parts) * kWarp + static_cast<int>(threadIdx.x) % kWarp) * kSide;
  task /= parts;
  const int begin = static_cast<int>(task % pieces) * kSummedCells, w = static_cast<int>(args.w);
  task /= pieces;
  const int64_t y = task % args.h, n = task / args.h, pixels = args.H * args.W;
  if (n >= args.N || c >= args.C) return;
  const int end = begin + kSummedCells < w ? begin + kSummedCells : w;
  const int* starts = scratch.starts + n * (args.h * args.w + 1);
  const Scalar* grads = static_cast<const Scalar*>(args.out) + n * pixels * args.C + c;
  Scalar* to = static_cast<Scalar*>(args.grad_low) + (n * args.h + y) * args.w * args.C + c;
  Acc sums[kMost][kSide] = {};
  for (int x = begin < kMost ? 0 : begin - kMost + 1; x < end; ++x) {
    for (int a = 0; a < kMost && a <= y; ++a) {
      const int64_t cell = (y - a) * args.w + x;
      for (int i = starts[cell]; i < starts[cell + 1]; ++i) {
        const int pixel = scratch.listed[n * pixels + i];
        const KeptReads<Acc>& reads = scratch.reads[n * pixels + pixel];
        const Acc down = reads.y[a];
        if (down == 0) continue;
        Acc upstream[kSide];
        load_side(grads + pixel * args.C, upstream);
#pragma unroll
        for (int b = 0; b < kMost; ++b) {
          const Acc weight = down * reads.x[b];
          if (weight == 0) continue;
#pragma unroll
          for (int j = 0; j < kSide; ++j) sums[b][j] += weight * upstream[j];
        }
      }
    }
    if (x >= begin) store_side(sums[0], to + x * args.C);
#pragma unroll
    for (int j = 0; j < kSide; ++j) {
#pragma unroll
      for (int b = 0; b + 1 < kMost; ++b) sums[b][j] = sums[b + 1][j];
      sums[kMost - 1][j] = 0;
    }
  }
}

}  // namespace bcmf::device
