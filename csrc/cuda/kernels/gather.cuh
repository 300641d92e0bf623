// The step low_gather: gradients of label pixels, or of tiles, are added up to those of logits of another size.
#pragma once

#include "cuda/kernels/logits.cuh"

namespace bcmf::device {

// Returns the weight of a cell in a label pixel.
template <typename Acc>
BCMF_HOST_DEVICE Acc weight_of_cell(const AxisTap<Acc>& tap, int64_t cell) {
  return cell == tap.first ? 1 - tap.weight : tap.weight;
}

// The logit whose gradient a thread of low_gather_* writes.
struct Cell {
  int64_t n, c, y, x;
  __device__ __forceinline__ Cell(const LossArgs& args, int64_t index)
      : n(index / (args.w * args.h * args.C)),
        c(index / (args.w * args.h) % args.C),
        y(index / args.w % args.h),
        x(index % args.w) {}
  template <typename Scalar, typename Acc>
  __device__ __forceinline__ void store(const LossArgs& args, Acc value) const {
    const MapView& v = args.grad;
    narrow(value, static_cast<Scalar*>(v.data) + n * v.stride_n + c * v.stride_c + y * v.stride_h + x * v.stride_w);
  }
};

// The label pixels along an axis that were resampled from a cell.
struct Span {
  int64_t begin, end;
  __device__ __forceinline__ Span(int64_t cell, int64_t in, int64_t out, bool align_corners)
      : begin(axis_start(cell - 1, in, out, align_corners)), end(axis_start(cell + 1, in, out, align_corners)) {}
};

constexpr int kGathered = 8;  // classes that a thread of low_gather_tiles writes
BCMF_HOST_DEVICE int64_t gathering_threads(const LossArgs& args) {
  return args.N * ((args.C + kGathered - 1) / kGathered) * args.h * args.w;
}

// Adds up, for each logit, what the tiles that touch it have stored in partials (tiles, C, cells_down, cells_across),
// in the order of the tiles.
template <typename Scalar>
__global__ void __launch_bounds__(kThreads, 1)
    low_gather_tiles(const __grid_constant__ LossArgs args, const typename AccOf<Scalar>::type* partials,
                     int64_t cells_down, int64_t cells_across) {
  using Acc = typename AccOf<Scalar>::type;
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= gathering_threads(args)) return;
  const int64_t x = index % args.w, y = index / args.w % args.h, group = index / args.w / args.h;
  const int64_t groups = (args.C + kGathered - 1) / kGathered, n = group / groups, c = group % groups * kGathered;
  const int classes = static_cast<int>(args.C - c < kGathered ? args.C - c : kGathered);
  const Span rows(y, args.h, args.H, args.align_corners), columns(x, args.w, args.W, args.align_corners);
  Acc sums[kGathered] = {};
  for (int64_t v = rows.begin / kRows; v * kRows < rows.end; ++v) {
    const int64_t row = y - axis_tap<Acc>(v * kRows, args.h, args.H, args.align_corners).first;
    for (int64_t u = columns.begin / kColumns; u * kColumns < columns.end; ++u) {
      const int64_t column = x - axis_tap<Acc>(u * kColumns, args.w, args.W, args.align_corners).first;
      const int64_t tile = (n * tiles_down(args) + v) * tiles_across(args) + u;
      const Acc* from = partials + ((tile * args.C + c) * cells_down + row) * cells_across + column;
      const int64_t next = cells_down * cells_across;
      if (classes == kGathered) {
#pragma unroll
        for (int i = 0; i < kGathered; ++i, from += next) sums[i] += *from;
      } else {
#pragma unroll
        for (int i = 0; i < kGathered; ++i, from += next)
          if (i < classes) sums[i] += *from;
      }
    }
  }
  const MapView& v = args.grad;
  Scalar* to = static_cast<Scalar*>(v.data) + n * v.stride_n + c * v.stride_c + y * v.stride_h + x * v.stride_w;
#pragma unroll
  for (int i = 0; i < kGathered; ++i)
    if (i < classes) narrow(sums[i], to + i * v.stride_c);
}

// Adds up, for each logit, gradients (N, C, H, W) of the labels' size. This serves where there are more logits than
// labels along an axis: the partial sums of tiles would take more memory there.
template <typename Scalar>
__global__ void __launch_bounds__(kThreads, 1)
    low_gather_pixels(const __grid_constant__ LossArgs args, const typename AccOf<Scalar>::type* gradients) {
  using Acc = typename AccOf<Scalar>::type;
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= args.N * args.C * args.h * args.w) return;
  const Cell cell(args, index);
  const Span rows(cell.y, args.h, args.H, args.align_corners), columns(cell.x, args.w, args.W, args.align_corners);
  Acc sum = 0;
  for (int64_t y = rows.begin; y < rows.end; ++y) {
    const Acc down = weight_of_cell(axis_tap<Acc>(y, args.h, args.H, args.align_corners), cell.y);
    const Acc* row = gradients + ((cell.n * args.C + cell.c) * args.H + y) * args.W;
    for (int64_t x = columns.begin; x < columns.end; ++x)
      sum += down * weight_of_cell(axis_tap<Acc>(x, args.w, args.W, args.align_corners), cell.x) * row[x];
  }
  cell.store<Scalar>(args, sum);
}

}  // namespace bcmf::device
