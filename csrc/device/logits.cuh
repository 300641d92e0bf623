// Where logits come from and gradients go to: a tensor of any strides, of the labels' size or resampled bilinearly.
#pragma once

#include "geometry.cuh"
#include "tile.cuh"

namespace bcmf::device {

// Logits of the labels' size.
template <typename Scalar_>
struct Direct {
  using Scalar = Scalar_;
  using Acc = typename AccOf<Scalar>::type;
  const LogitView& view;
  const Scalar* stack_[kStack];

  __device__ __forceinline__ Direct(const LossArgs& args, const Tile& tile) : view(args.logits) {
    const Scalar* column = data() + tile.n * view.stride_n + clamp(tile.x(), args.W) * view.stride_w;
#pragma unroll
    for (int k = 0; k < kStack; ++k) stack_[k] = column + clamp(tile.y(k), args.H) * view.stride_h;
  }
  // Class c of the thread's stack; anything beyond the border.
  __device__ __forceinline__ void stack(int64_t c, Acc (&z)[kStack]) const {
#pragma unroll
    for (int k = 0; k < kStack; ++k) z[k] = widen(stack_[k][c * view.stride_c]);
  }
  __device__ __forceinline__ Acc at(int64_t n, int64_t y, int64_t x, int64_t c) const {
    return widen(data()[n * view.stride_n + c * view.stride_c + y * view.stride_h + x * view.stride_w]);
  }

 private:
  __device__ __forceinline__ const Scalar* data() const { return static_cast<const Scalar*>(view.data); }
};

// AxisTap in half the registers.
template <typename Acc>
struct Tap {
  int first, second;
  Acc weight;
  __device__ __forceinline__ Tap() {}
  __device__ __forceinline__ Tap(int64_t i, int64_t in, int64_t out, bool align_corners) {
    const AxisTap<Acc> tap = axis_tap<Acc>(i, in, out, align_corners);
    first = static_cast<int>(tap.first), second = static_cast<int>(tap.second), weight = tap.weight;
  }
};

// Logits of another size. The two rows of logits that a stack lies between are mostly the same for all its pixels: they
// are resampled along x once then.
template <typename Scalar_>
struct Resampled {
  using Scalar = Scalar_;
  using Acc = typename AccOf<Scalar>::type;
  const LossArgs& args;
  const Scalar* image;
  Tap<Acc> across, down[kStack];
  bool same_rows;

  __device__ __forceinline__ Resampled(const LossArgs& args, const Tile& tile)
      : args(args), image(data() + tile.n * args.logits.stride_n) {
    across = tap(clamp(tile.x(), args.W), args.w, args.W);
    same_rows = true;
#pragma unroll
    for (int k = 0; k < kStack; ++k) {
      down[k] = tap(clamp(tile.y(k), args.H), args.h, args.H);
      same_rows = same_rows && down[k].first == down[0].first && down[k].second == down[0].second;
    }
  }
  __device__ __forceinline__ void stack(int64_t c, Acc (&z)[kStack]) const {
    const Scalar* map = image + c * args.logits.stride_c;
    if (same_rows) {
      const Acc above = row(map, down[0].first, across), below = row(map, down[0].second, across);
#pragma unroll
      for (int k = 0; k < kStack; ++k) z[k] = mix(above, below, down[k].weight);
    } else {
#pragma unroll
      for (int k = 0; k < kStack; ++k)
        z[k] = mix(row(map, down[k].first, across), row(map, down[k].second, across), down[k].weight);
    }
  }
  __device__ __forceinline__ Acc at(int64_t n, int64_t y, int64_t x, int64_t c) const {
    const Scalar* map = data() + n * args.logits.stride_n + c * args.logits.stride_c;
    const Tap<Acc> a = tap(x, args.w, args.W), d = tap(y, args.h, args.H);
    return mix(row(map, d.first, a), row(map, d.second, a), d.weight);
  }

 private:
  __device__ __forceinline__ const Scalar* data() const { return static_cast<const Scalar*>(args.logits.data); }
  __device__ __forceinline__ Tap<Acc> tap(int64_t i, int64_t in, int64_t out) const {
    return {i, in, out, args.align_corners};
  }
  __device__ __forceinline__ Acc row(const Scalar* map, int64_t y, const Tap<Acc>& a) const {
    const Scalar* from = map + y * args.logits.stride_h;
    return mix(widen(from[a.first * args.logits.stride_w]), widen(from[a.second * args.logits.stride_w]), a.weight);
  }
};

// Gradients of the labels' size, to a tensor.
template <typename Scalar, typename Acc_>
struct Store {
  using Acc = Acc_;
  static constexpr int kScratch = 1;
  LogitView view;

  __device__ __forceinline__ void begin(const LossArgs&, const Tile&, Acc*) {}
  __device__ __forceinline__ void put(const LossArgs&, const Tile& tile, int64_t c, const Acc (&value)[kStack],
                                      Acc*) const {
    Scalar* to = static_cast<Scalar*>(view.data) + tile.n * view.stride_n + c * view.stride_c;
    for_stack(tile, [&](int k) { narrow(value[k], to + tile.y(k) * view.stride_h + tile.x() * view.stride_w); });
  }
};

// How many logit cells label pixels first..last of an axis touch, and which is the first of them.
struct Cells {
  int64_t first, count;
};
BCMF_HOST_DEVICE Cells cells_between(int64_t first, int64_t last, int64_t in, int64_t out, bool align_corners) {
  const int64_t from = axis_tap<double>(first, in, out, align_corners).first;
  return {from, axis_tap<double>(last, in, out, align_corners).second - from + 1};
}

// Along an axis of a tile: the weight of each label pixel's second cell, and where the label pixels begin whose first
// cell is this one: start[j + 1] for cell j, counted from the tile's first.
template <typename Acc>
struct CellAxis {
  Acc* weight;
  int* start;

  // By all threads of the block; `length` label pixels from `begin` on. `first` is scratch.
  __device__ __forceinline__ void fill(int64_t begin, int length, const Cells& cells, int64_t in, int64_t out,
                                       bool align_corners, int* first) const {
    for (int i = threadIdx.x; i < length; i += kThreads) {
      const AxisTap<Acc> tap = axis_tap<Acc>(begin + i, in, out, align_corners);
      weight[i] = tap.weight;
      first[i] = static_cast<int>(tap.first - cells.first);
    }
    __syncthreads();
    for (int j = threadIdx.x; j < cells.count + 2; j += kThreads) {
      int before = 0;
      while (before < length && first[before] < j - 1) ++before;
      start[j] = before;
    }
    __syncthreads();
  }
  // What cell j gets of values[i * stride].
  __device__ __forceinline__ Acc gather(int j, const Acc* values, int stride) const {
    Acc sum = 0;
    for (int i = start[j]; i < start[j + 1]; ++i) sum += weight[i] * values[i * stride];
    for (int i = start[j + 1]; i < start[j + 2]; ++i) sum += (1 - weight[i]) * values[i * stride];
    return sum;
  }
};

// Gradients that go back to logits of which there are no more than labels, along either axis: what a tile adds to each
// logit cell that it touches. join_tiles adds the tiles up.
template <typename Acc_>
struct TileCells {
  using Acc = Acc_;
  static constexpr int kDown = kRows + 2, kAcross = kColumns + 2;  // the most cells that a tile touches
  static constexpr int kScratch = (kRows + kDown) * kColumns;      // values of a class, and their sums along y
  Acc* partials;                                                   // (tiles, C, cells_down, cells_across)
  int64_t cells_down, cells_across;                                // of the tile that touches most
  int rows, columns;
  CellAxis<Acc> down, across;

  __device__ __forceinline__ void begin(const LossArgs& args, const Tile& tile, Acc* scratch) {
    BCMF_SHARED(Acc, weights, kRows + kColumns);
    int* firsts = reinterpret_cast<int*>(scratch);  // read no more after this
    BCMF_SHARED(int, starts, kDown + 2 + kAcross + 2);
    down = {weights, starts};
    across = {weights + kRows, starts + kDown + 2};
    const Cells y = cells_between(tile.top, tile.top + tile.rows - 1, args.h, args.H, args.align_corners);
    const Cells x = cells_between(tile.left, tile.left + tile.columns - 1, args.w, args.W, args.align_corners);
    rows = static_cast<int>(y.count), columns = static_cast<int>(x.count);
    down.fill(tile.top, tile.rows, y, args.h, args.H, args.align_corners, firsts);
    across.fill(tile.left, tile.columns, x, args.w, args.W, args.align_corners, firsts);
  }
  // scratch: kScratch entries of the block, which nothing else reads or writes meanwhile.
  __device__ __forceinline__ void put(const LossArgs& args, const Tile& tile, int64_t c, const Acc (&value)[kStack],
                                      Acc* scratch) const {
    Acc* sums = scratch + kRows * kColumns;
    for_stack(tile, [&](int k) { scratch[(tile.row + k) * kColumns + tile.column] = value[k]; });
    __syncthreads();
    for (int i = threadIdx.x; i < rows * kColumns; i += kThreads)
      if (i % kColumns < tile.columns) sums[i] = down.gather(i / kColumns, scratch + i % kColumns, kColumns);
    __syncthreads();
    Acc* map = partials + (blockIdx.x * args.C + c) * cells_down * cells_across;
    for (int i = threadIdx.x; i < rows * columns; i += kThreads)
      map[i / columns * cells_across + i % columns] = across.gather(i % columns, sums + i / columns * kColumns, 1);
  }
};

// The weight of a cell in a label pixel.
template <typename Acc>
BCMF_HOST_DEVICE Acc share_of(const AxisTap<Acc>& tap, int64_t cell) {
  return cell == tap.first ? 1 - tap.weight : tap.weight;
}

// The logit that a thread of the last step writes.
struct Cell {
  int64_t n, c, y, x;
  __device__ __forceinline__ Cell(const LossArgs& args, int64_t index)
      : n(index / (args.w * args.h * args.C)),
        c(index / (args.w * args.h) % args.C),
        y(index / args.w % args.h),
        x(index % args.w) {}
  template <typename Scalar, typename Acc>
  __device__ __forceinline__ void store(const LossArgs& args, Acc value) const {
    const LogitView& v = args.grad;
    narrow(value, static_cast<Scalar*>(v.data) + n * v.stride_n + c * v.stride_c + y * v.stride_h + x * v.stride_w);
  }
};

// The label pixels beside a cell, along an axis.
struct Span {
  int64_t begin, end;
  __device__ __forceinline__ Span(int64_t cell, int64_t in, int64_t out, bool align_corners)
      : begin(axis_start(cell - 1, in, out, align_corners)), end(axis_start(cell + 1, in, out, align_corners)) {}
};

// Adds up, for each logit, what the tiles that touch it found: (tiles, C, cells_down, cells_across), in their order.
template <typename Scalar>
__global__ void __launch_bounds__(kThreads, 1)
    join_tiles(const __grid_constant__ LossArgs args, const typename AccOf<Scalar>::type* partials, int64_t cells_down,
               int64_t cells_across) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= args.N * args.C * args.h * args.w) return;
  const Cell cell(args, index);
  const Span rows(cell.y, args.h, args.H, args.align_corners), columns(cell.x, args.w, args.W, args.align_corners);
  typename AccOf<Scalar>::type sum = 0;
  for (int64_t y = rows.begin / kRows; y * kRows < rows.end; ++y) {
    const int64_t row = cell.y - axis_tap<double>(y * kRows, args.h, args.H, args.align_corners).first;
    for (int64_t x = columns.begin / kColumns; x * kColumns < columns.end; ++x) {
      const int64_t column = cell.x - axis_tap<double>(x * kColumns, args.w, args.W, args.align_corners).first;
      const int64_t tile = (cell.n * tiles_down(args) + y) * tiles_across(args) + x;
      sum += partials[((tile * args.C + cell.c) * cells_down + row) * cells_across + column];
    }
  }
  cell.store<Scalar>(args, sum);
}

// The same of gradients of the labels' size, (N, C, H, W): where logits are more than labels.
template <typename Scalar>
__global__ void __launch_bounds__(kThreads, 1)
    gather_cells(const __grid_constant__ LossArgs args, const typename AccOf<Scalar>::type* gradients) {
  using Acc = typename AccOf<Scalar>::type;
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= args.N * args.C * args.h * args.w) return;
  const Cell cell(args, index);
  const Span rows(cell.y, args.h, args.H, args.align_corners), columns(cell.x, args.w, args.W, args.align_corners);
  Acc sum = 0;
  for (int64_t y = rows.begin; y < rows.end; ++y) {
    const Acc down = share_of(axis_tap<Acc>(y, args.h, args.H, args.align_corners), cell.y);
    const Acc* row = gradients + ((cell.n * args.C + cell.c) * args.H + y) * args.W;
    for (int64_t x = columns.begin; x < columns.end; ++x)
      sum += down * share_of(axis_tap<Acc>(x, args.w, args.W, args.align_corners), cell.x) * row[x];
  }
  cell.store<Scalar>(args, sum);
}

}  // namespace bcmf::device
