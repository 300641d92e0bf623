// Sources read the logits of label pixels, and sinks write their gradients: from and to a tensor of the labels' size,
// in one of three layouts, or a tensor of another size, which is resampled bilinearly.
#pragma once

#include "common/geometry.h"
#include "cuda/kernels/tile.cuh"

namespace bcmf::device {

// ---------------------------------------------------------------------------------------------------------------------
// Sources read class by class: the thread's stack of class c is at a place that `at` gives for c, and `next` for the
// class behind another one. `take` takes their shared memory on the host. A class can be read if `is_ready`; `stage`
// makes classes from `begin` on ready, and returns the first one that is not. What is read beyond the border of the
// image may be anything. read<true> is for those that is_plain, which is the same for all lanes of a warp.

// Reads single logits of the labels' size.
template <typename Scalar_>
struct DirectEntries {
  using Scalar = Scalar_;
  using Acc = typename AccOf<Scalar>::type;
  static constexpr int kAtOnce = sizeof(Acc) == 8 ? 1 : 4;  // classes that are read together
  static constexpr bool kPacksStats = true;                 // see stats.cuh
  const MapView& view;

  using Staged = SharedArray<Scalar>;
  static Staged take(const LossArgs&, SharedCutter&) { return {}; }
  __device__ __forceinline__ explicit DirectEntries(const LossArgs& args) : view(args.logits) {}
  __device__ __forceinline__ int stage(int, int end) const { return end; }
  __device__ __forceinline__ bool is_ready(int) const { return true; }
  __device__ __forceinline__ bool is_plain() const { return true; }
  __device__ __forceinline__ Acc at(int64_t n, int y, int x, int c) const {
    return widen(data()[n * view.stride_n + c * view.stride_c + y * view.stride_h + x * view.stride_w]);
  }
  __device__ __forceinline__ const Scalar* data() const { return static_cast<const Scalar*>(view.data); }
};

// Reads stacks of logits with any strides. It is fast where neighbours along x are neighbours in memory.
template <typename Scalar>
struct DirectAny : DirectEntries<Scalar> {
  using Entries = DirectEntries<Scalar>;
  using typename Entries::Acc;
  using Tile = Stacks<false>;
  static constexpr int kBlocks = 1;  // of a kernel, for which a multiprocessor has to have room
  const Scalar* stack_[kStack];

  __device__ __forceinline__ DirectAny(const LossArgs& args, const Tile& tile, const SharedArray<Scalar>&)
      : Entries(args) {
    const Scalar* column = this->data() + tile.n * this->view.stride_n + clamp(tile.x(0), tile.W) * this->view.stride_w;
#pragma unroll
    for (int k = 0; k < kStack; ++k) stack_[k] = column + clamp(tile.y(k), tile.H) * this->view.stride_h;
  }
  __device__ __forceinline__ int64_t at(int c) const { return c * this->view.stride_c; }
  __device__ __forceinline__ int64_t next(int64_t place) const { return place + this->view.stride_c; }
  template <bool = false>
  __device__ __forceinline__ void read(int64_t place, Acc (&z)[kStack]) const {
#pragma unroll
    for (int k = 0; k < kStack; ++k) z[k] = widen(stack_[k][place]);
  }
  // Reads class c of one pixel of the stack.
  __device__ __forceinline__ Acc own(int k, int c) const { return widen(stack_[k][c * this->view.stride_c]); }
};

// Reads a stack at once, from logits that are contiguous along x and whose rows begin at multiples of a stack.
template <typename Scalar>
struct DirectRows : DirectEntries<Scalar> {
  using Entries = DirectEntries<Scalar>;
  using typename Entries::Acc;
  using Tile = Stacks<true>;
  static constexpr int kBlocks = 2;
  const Scalar* first_;

  static bool can_read(const MapView& view, const LossArgs& args) {
    return view.stride_w == 1 && args.W % kStack == 0 && begins_at<Scalar>(view, args, view.stride_c, kStack);
  }
  __device__ __forceinline__ DirectRows(const LossArgs& args, const Tile& tile, const SharedArray<Scalar>&)
      : Entries(args) {
    const int y = tile.has(0) ? tile.y(0) : tile.top, x = tile.has(0) ? tile.x(0) : tile.left;
    first_ = this->data() + tile.n * this->view.stride_n + y * this->view.stride_h + x;
  }
  __device__ __forceinline__ const Scalar* at(int c) const { return first_ + c * this->view.stride_c; }
  __device__ __forceinline__ const Scalar* next(const Scalar* place) const { return place + this->view.stride_c; }
  template <bool = false>
  __device__ __forceinline__ void read(const Scalar* place, Acc (&z)[kStack]) const {
    load_widened(place, z);
  }
  __device__ __forceinline__ Acc own(int k, int c) const { return widen(first_[c * this->view.stride_c + k]); }
};

// Reads logits that are contiguous along classes, then along x (channels_last). The block first copies its tile to
// shared memory, whole rows at a time. Where whole units of 8 bytes are a pixel's classes, an odd number of units lies
// between neighbouring pixels there: threads would all read from a few banks otherwise.
template <typename Scalar>
struct DirectPixels : DirectEntries<Scalar> {
  using Entries = DirectEntries<Scalar>;
  using typename Entries::Acc;
  using Tile = Stacks<false>;
  static constexpr int kBlocks = 2, kVector = 16 / sizeof(Scalar), kUnit = 8 / sizeof(Scalar);
  struct Staged {
    SharedArray<Scalar> pixels;
    int pitch;  // from a pixel to the next
  };
  const Tile& tile;
  Scalar* staged;  // (kRows, kColumns, pitch)
  int C, pitch;

  static bool can_read(const MapView& view, const LossArgs& args) {
    return view.stride_c == 1 && view.stride_w == args.C && args.W * args.C % kVector == 0 &&
           begins_at<Scalar>(view, args, 0, kVector);
  }
  static Staged take(const LossArgs& args, SharedCutter& shared) {
    const int64_t pitch = args.C % kUnit == 0 ? (args.C / kUnit | 1) * kUnit : args.C;
    return {shared.take<Scalar>(kRows * kColumns * pitch), static_cast<int>(pitch)};
  }
  __device__ __forceinline__ DirectPixels(const LossArgs& args, const Tile& tile, const Staged& memory)
      : Entries(args), tile(tile), staged(memory.pixels.data()), C(static_cast<int>(args.C)), pitch(memory.pitch) {
    copy(this->view, [](auto* shared, const auto* memory) { *shared = *memory; });
    __syncthreads();
  }
  __device__ __forceinline__ int at(int c) const { return c; }
  __device__ __forceinline__ int next(int c) const { return c + 1; }
  template <bool = false>
  __device__ __forceinline__ void read(int c, Acc (&z)[kStack]) const {
#pragma unroll
    for (int k = 0; k < kStack; ++k) z[k] = widen(*staged_at(k, c));
  }
  __device__ __forceinline__ Acc own(int k, int c) const { return Entries::at(tile.n, tile.y(k), tile.x(k), c); }
  __device__ __forceinline__ Scalar* staged_at(int k, int c) const {
    return staged + (tile.row(k) * kColumns + tile.column(k)) * pitch + c;
  }
  // Calls f(shared, memory) for all of the tile, 16 bytes at a time, or a unit. A row of the tile is a multiple of 16
  // bytes long, as can_read has found a row of the image to be.
  template <typename F>
  __device__ __forceinline__ void copy(const MapView& to, F f) const {
    Scalar* corner =
        static_cast<Scalar*>(to.data) + tile.n * to.stride_n + tile.top * to.stride_h + tile.left * to.stride_w;
    constexpr int kPerRow = kThreads / kRows;  // threads to a row: no division by its length
    const int row = static_cast<int>(threadIdx.x) / kPerRow, lane = static_cast<int>(threadIdx.x) % kPerRow;
    if (row >= tile.rows) return;
    Scalar *shared = staged + row * kColumns * pitch, *memory = corner + row * to.stride_h;
    if (C % kUnit != 0) {
#pragma unroll 4
      for (int entry = lane * kVector; entry < tile.columns * C; entry += kPerRow * kVector)
        f(reinterpret_cast<Words<Scalar, kVector>*>(shared + entry),
          reinterpret_cast<Words<Scalar, kVector>*>(memory + entry));
      return;
    }
    const int of_pixel = C / kUnit, columns = kPerRow / of_pixel, rest = kPerRow % of_pixel;
    int column = lane / of_pixel, unit = lane % of_pixel;
#pragma unroll 4
    for (int i = lane; i < tile.columns * of_pixel; i += kPerRow) {
      f(reinterpret_cast<Words<Scalar, kUnit>*>(shared + column * pitch + unit * kUnit),
        reinterpret_cast<Words<Scalar, kUnit>*>(memory + i * kUnit));
      column += columns, unit += rest;
      if (unit >= of_pixel) ++column, unit -= of_pixel;
    }
  }
};

// An AxisTap that takes few registers: its second index is the neighbour of the first, if there is one.
template <typename Acc>
struct Tap {
  int first;
  Acc weight;
  __device__ __forceinline__ Tap() {}
  __device__ __forceinline__ Tap(int64_t i, int64_t in, int64_t out, bool align_corners) {
    const AxisTap<Acc> tap = axis_tap<Acc>(i, in, out, align_corners);
    first = static_cast<int>(tap.first), weight = tap.weight;
  }
};

// Reads single logits of another size.
template <typename Scalar_>
struct ResampledEntries {
  using Scalar = Scalar_;
  using Acc = typename AccOf<Scalar>::type;
  static constexpr bool kPacksStats = false;
  const LossArgs& args;

  __device__ __forceinline__ explicit ResampledEntries(const LossArgs& args) : args(args) {}
  __device__ __forceinline__ Acc at(int64_t n, int y, int x, int c) const {
    return between(image(n) + c * args.logits.stride_c, tap_x(x), tap_y(y));
  }
  __device__ __forceinline__ const Scalar* image(int64_t n) const {
    return static_cast<const Scalar*>(args.logits.data) + n * args.logits.stride_n;
  }
  __device__ __forceinline__ Tap<Acc> tap_x(int x) const { return {x, args.w, args.W, args.align_corners}; }
  __device__ __forceinline__ Tap<Acc> tap_y(int y) const { return {y, args.h, args.H, args.align_corners}; }
  __device__ __forceinline__ int after(const Tap<Acc>& across) const {
    return across.first + 1 < args.w ? across.first + 1 : across.first;
  }
  __device__ __forceinline__ int below(const Tap<Acc>& down) const {
    return down.first + 1 < args.h ? down.first + 1 : down.first;
  }
  __device__ __forceinline__ Acc between(const Scalar* map, const Tap<Acc>& across, const Tap<Acc>& down) const {
    const Scalar *upper = map + down.first * args.logits.stride_h, *lower = map + below(down) * args.logits.stride_h;
    const int64_t left = across.first * args.logits.stride_w, right = after(across) * args.logits.stride_w;
    return mix(mix(widen(upper[left]), widen(upper[right]), across.weight),
               mix(widen(lower[left]), widen(lower[right]), across.weight), down.weight);
  }
};

// Reads stacks of logits of another size, each pixel by itself.
template <typename Scalar>
struct Resampled : ResampledEntries<Scalar> {
  using Entries = ResampledEntries<Scalar>;
  using typename Entries::Acc;
  using Tile = Stacks<false>;
  static constexpr int kAtOnce = 1, kBlocks = 1;
  const Scalar* first_;
  Tap<Acc> across, down[kStack];

  using Staged = SharedArray<Scalar>;
  static Staged take(const LossArgs&, SharedCutter&) { return {}; }
  __device__ __forceinline__ Resampled(const LossArgs& args, const Tile& tile, const SharedArray<Scalar>&)
      : Entries(args), first_(this->image(tile.n)), across(this->tap_x(clamp(tile.x(0), tile.W))) {
#pragma unroll
    for (int k = 0; k < kStack; ++k) down[k] = this->tap_y(clamp(tile.y(k), tile.H));
  }
  __device__ __forceinline__ int stage(int, int end) const { return end; }
  __device__ __forceinline__ bool is_ready(int) const { return true; }
  __device__ __forceinline__ bool is_plain() const { return true; }
  __device__ __forceinline__ int at(int c) const { return c; }
  __device__ __forceinline__ int next(int c) const { return c + 1; }
  template <bool = false>
  __device__ __forceinline__ void read(int c, Acc (&z)[kStack]) const {
#pragma unroll
    for (int k = 0; k < kStack; ++k) z[k] = own(k, c);
  }
  __device__ __forceinline__ Acc own(int k, int c) const {
    return this->between(first_ + c * this->args.logits.stride_c, across, down[k]);
  }
};

// Returns the most cells along an axis that `length` neighbouring label pixels lie between.
BCMF_HOST_DEVICE int most_cells(int64_t length, int64_t in, int64_t out) {
  const int64_t most = ((length - 1) * in + out - 1) / out + 2;
  return static_cast<int>(most < in ? most : in);
}

// Returns the most cells of a tile, to an odd number.
BCMF_HOST_DEVICE int most_pitch(const LossArgs& args) {
  return (most_cells(kRows, args.h, args.H) * most_cells(kColumns, args.w, args.W)) | 1;
}

// How much of its first cell a resampled pixel is, and of its second one.
template <typename Acc>
struct alignas(2 * sizeof(Acc)) AxisWeights {
  Acc first, second;
};
// The value between a and b; kFinite: both are finite.
template <bool kFinite, typename Acc>
__device__ __forceinline__ Acc mix(Acc a, Acc b, const AxisWeights<Acc>& weights) {
  return kFinite ? mix_finite(a, b, weights.first, weights.second) : bcmf::mix(a, b, weights.second);
}

// Resampling along an axis of a tile. Pixels and cells are counted from the tile's first ones.
template <typename Acc, int kLength>
struct TileAxis {
  AxisWeights<Acc>* weights;  // (kSlots,)
  int* cell;                  // the first cell of a pixel, which is counted among all logits
  int* start;                 // the first pixel of a quad, and the end of the last one
  int first;                  // the tile's first cell, among all logits
  int cells;                  // that the tile lies between
  int quads;                  // spans of pixels between the same two cells

  // Where the weights of a pixel of a quad are. Across, those of quads that threads read at the same time lie in other
  // banks.
  static constexpr int kShifts = kLength == kColumns ? 8 : 0, kSlots = kLength + kShifts;
  static __device__ __forceinline__ int shift_of(int quad) { return quad < kShifts ? quad : kShifts; }
  // Two calls, between which all threads of the block wait for each other, fill in the arrays. weight: of the thread's
  // pixel.
  __device__ __forceinline__ void fill(int begin, int length, int64_t in, int64_t out, bool align_corners,
                                       Acc& weight) const {
    const int i = static_cast<int>(threadIdx.x);
    if (i >= length) return;
    const AxisTap<Acc> tap = axis_tap<Acc>(begin + i, in, out, align_corners);
    cell[i] = static_cast<int>(tap.first), weight = tap.weight;
  }
  __device__ __forceinline__ void finish(int length, int64_t in, Acc weight) {
    first = cell[0];
    const int last = cell[length - 1];
    quads = last - first + 1;
    cells = last + 1 < in ? quads + 1 : quads;
    const int i = static_cast<int>(threadIdx.x);
    if (i >= length) return;
    const int quad = cell[i] - first;
    weights[i + shift_of(quad)] = {1 - weight, weight};
    // There are no more cells than pixels, so that the next pixel lies in the same quad or in the next one.
    if (i == 0 || cell[i] != cell[i - 1]) start[quad] = i;
    if (i + 1 == length) start[quads] = length;
  }
};

// Both axes of a tile, and its cells.
template <typename Entries>
struct TileCells {
  using Acc = typename Entries::Acc;
  TileAxis<Acc, kRows> down;
  TileAxis<Acc, kColumns> across;
  Acc* staged;  // (classes, pitch): of each class (down.cells, across.cells)
  int pitch;    // odd, so that neighbouring classes lie in other banks

  // All threads of the block call it, and wait for each other before they read weights, or where quads start.
  __device__ __forceinline__ TileCells(const LossArgs& args, const Tile& tile, Acc* staged) : staged(staged) {
    BCMF_SHARED(AxisWeights<Acc>, weights, decltype(down)::kSlots + decltype(across)::kSlots);
    BCMF_SHARED(int, numbers, 2 * (kRows + kColumns) + 2);
    down.cell = numbers, across.cell = down.cell + kRows;
    down.start = across.cell + kColumns, across.start = down.start + kRows + 1;
    down.weights = weights, across.weights = weights + decltype(down)::kSlots;
    Acc weight_down = 0, weight_across = 0;
    down.fill(tile.top, tile.rows, args.h, args.H, args.align_corners, weight_down);
    across.fill(tile.left, tile.columns, args.w, args.W, args.align_corners, weight_across);
    __syncthreads();  // all cells are known
    down.finish(tile.rows, args.h, weight_down);
    across.finish(tile.columns, args.w, weight_across);
    pitch = count() | 1;
  }
  __device__ __forceinline__ int count() const { return down.cells * across.cells; }

  // Loads `classes` of them from class c on, and tells whether those that this thread has loaded are finite. All
  // threads of the block call it, and wait for each other before and after it.
  __device__ __forceinline__ bool load(const LossArgs& args, const Tile& tile, const Entries& entries, int c,
                                       int classes) const {
    constexpr int kAtOnce = 64;  // cells of a class, a thread each
    const MapView& view = args.logits;
    const auto* corner =
        entries.image(tile.n) + c * view.stride_c + down.first * view.stride_h + across.first * view.stride_w;
    Acc zero = 0;  // it is not any more if a logit is not finite
    for (int i = static_cast<int>(threadIdx.x) % kAtOnce; i < count(); i += kAtOnce) {
      int of_chunk = static_cast<int>(threadIdx.x) / kAtOnce;
      const auto* from =
          corner + i / across.cells * view.stride_h + i % across.cells * view.stride_w + of_chunk * view.stride_c;
      Acc* to = staged + of_chunk * pitch + i;
      constexpr int kStep = kThreads / kAtOnce;
      for (; of_chunk < classes; of_chunk += kStep, from += kStep * view.stride_c, to += kStep * pitch) {
        *to = widen(*from);
        zero += *to * 0;
      }
    }
    return zero == 0;
  }
};

// Reads stacks of logits of another size, of which there are no more than labels along either axis. The block stages
// the cells of its tile in shared memory, some classes at a time.
template <typename Scalar>
struct Upsampled : ResampledEntries<Scalar> {
  using Entries = ResampledEntries<Scalar>;
  using typename Entries::Acc;
  using Tile = Stacks<false>;
  static constexpr int kAtOnce = 4, kBlocks = 2;
  static constexpr int kBudget = 12 << 10;  // bytes of cells, if that is enough for a class
  const Tile& tile;
  TileCells<Entries> cells;
  int most;  // classes that are staged together
  AxisWeights<Acc> across, down[kStack];
  int corner, right,
      below;          // of the stack's first pixel: its upper left cell, and from there to those beside and below
  unsigned advances;  // a bit for each pixel that lies a row of cells lower than the one above it
  mutable int staged_begin = 0, staged_end = 0;
  mutable bool careful = true;  // not all staged logits are finite

  struct Staged {
    SharedArray<Acc> cells;
    int classes;  // that are staged together
  };
  static Staged take(const LossArgs& args, SharedCutter& shared) {
    const int cells = most_pitch(args), fit = kBudget / static_cast<int>(cells * sizeof(Acc)) / kAtOnce * kAtOnce;
    const int classes = fit < kAtOnce ? kAtOnce : fit < args.C ? fit : static_cast<int>(args.C);
    return {shared.take<Acc>(classes * cells), classes};
  }
  __device__ __forceinline__ Upsampled(const LossArgs& args, const Tile& tile, const Staged& memory)
      : Entries(args), tile(tile), cells(args, tile, memory.cells.data()), most(memory.classes), advances(0) {
    const int column = clamp(tile.first_column, tile.columns);
    const int row = cells.down.cell[clamp(tile.first_row, tile.rows)] - cells.down.first;
    const int cell = cells.across.cell[column] - cells.across.first;
    corner = row * cells.across.cells + cell;
    right = cell + 1 < cells.across.cells ? 1 : 0;
    below = row + 1 < cells.down.cells ? cells.across.cells : 0;
    __syncthreads();  // all weights are known
    across = cells.across.weights[column + cells.across.shift_of(cell)];
    int before = row + cells.down.first;
#pragma unroll
    for (int k = 0; k < kStack; ++k) {
      const int i = clamp(tile.first_row + k, tile.rows);
      down[k] = cells.down.weights[i + cells.down.shift_of(cells.down.cell[i] - cells.down.first)];
      if (cells.down.cell[i] != before) advances |= 1u << k;
      before = cells.down.cell[i];
    }
  }
  __device__ __forceinline__ bool is_ready(int c) const { return c >= staged_begin && c < staged_end; }
  // Stages classes from `begin` on, and returns the first one without.
  __device__ __forceinline__ int stage(int begin, int end) const {
    const int count = end - begin < most ? end - begin : most;
    staged_begin = begin, staged_end = begin + count;
    __syncthreads();  // other classes are not needed any more
    careful = any_of_block(!cells.load(this->args, tile, *this, begin, count));
    return staged_end;
  }
  __device__ __forceinline__ const Acc* at(int c) const {
    return cells.staged + (c - staged_begin) * cells.pitch + corner;
  }
  __device__ __forceinline__ const Acc* next(const Acc* top) const { return top + cells.pitch; }
  // Finite logits, between the same two rows of cells.
  __device__ __forceinline__ bool is_plain() const { return !careful && advances == 0; }
  template <bool kPlain = false>
  __device__ __forceinline__ void read(const Acc* top, Acc (&z)[kStack]) const {
    if constexpr (kPlain) {
      const Acc upper = mix_row<true>(top), lower = mix_row<true>(top + below);
#pragma unroll
      for (int k = 0; k < kStack; ++k) z[k] = mix<true>(upper, lower, down[k]);
    } else if (careful) {
      mix_stack<false>(top, z);
    } else {
      mix_stack<true>(top, z);
    }
  }
  __device__ __forceinline__ Acc own(int k, int c) const {
    const int row = clamp(tile.row(k), tile.rows), column = clamp(tile.first_column, tile.columns);
    Tap<Acc> down, across;
    down.first = cells.down.cell[row], down.weight = this->down[k].second;
    across.first = cells.across.cell[column], across.weight = this->across.second;
    return this->between(this->image(tile.n) + c * this->args.logits.stride_c, across, down);
  }

 private:
  template <bool kFinite>
  __device__ __forceinline__ Acc mix_row(const Acc* row) const {
    return mix<kFinite>(row[0], row[right], across);
  }
  template <bool kFinite>
  __device__ __forceinline__ void mix_stack(const Acc* top, Acc (&z)[kStack]) const {
    Acc upper = mix_row<kFinite>(top), lower = mix_row<kFinite>(top + below);
    const int columns = cells.across.cells;
    int rows_below = cells.down.cells - 1 - corner / columns;  // the upper row
#pragma unroll
    for (int k = 0; k < kStack; ++k) {
      if (advances >> k & 1) {
        --rows_below;
        top += columns;
        upper = lower, lower = mix_row<kFinite>(rows_below > 0 ? top + columns : top);
      }
      z[k] = mix<kFinite>(upper, lower, down[k]);
    }
  }
};

// Reads kCount classes of a stack from `place` on, which goes behind them. All reads are under way at the same time.
template <bool kPlain, typename Source, typename Place, typename Acc, int kCount>
__device__ __forceinline__ void read_classes(const Source& source, Place& place, Acc (&z)[kCount][kStack]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j, place = source.next(place)) source.template read<kPlain>(place, z[j]);
}

// Calls f(first, z) for groups of all classes of a stack, z[j] being class first + j. Groups may have different
// lengths.
template <typename Source, typename F>
__device__ __forceinline__ void for_classes(const Source& source, int C, F f) {
  constexpr int kAtOnce = Source::kAtOnce;
  using Acc = typename Source::Acc;
  for (int first = 0; first < C;) {
    const int end = source.stage(first, C);
    auto place = source.at(first);
    if (source.is_plain()) {
#pragma unroll 1
      for (; first + kAtOnce <= end; first += kAtOnce) {
        Acc z[kAtOnce][kStack];
        read_classes<true>(source, place, z);
        f(first, z);
      }
      with_number<kAtOnce - 1>(end - first, [&](auto count) {
        Acc z[decltype(count)::value][kStack];
        read_classes<true>(source, place, z);
        f(first, z);
      });
    } else {
#pragma unroll 1
      for (; first < end; ++first) {
        Acc z[1][kStack];
        read_classes<false>(source, place, z);
        f(first, z);
      }
    }
    first = end;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Sinks take the gradients of stacks class by class, by `put` at the class's place, or of one pixel, by `put_one`.
// After the last one comes `finish`.

// The members that sinks into a tensor have in common: a place is how many entries a class begins behind the first.
struct Store {
  MapView view;

  __device__ __forceinline__ int64_t at(int c) const { return c * view.stride_c; }
  __device__ __forceinline__ int64_t next(int64_t place) const { return place + view.stride_c; }
  template <typename Source>
  __device__ __forceinline__ void finish(const Source&) const {}
};

// Stores to a tensor with any strides.
template <typename Scalar, typename Acc_>
struct StoreAny : Store {
  using Acc = Acc_;

  template <typename Source>
  __device__ __forceinline__ void put(const Source&, const typename Source::Tile& tile, int64_t place,
                                      const Acc (&value)[kStack]) const {
    tile.for_each([&](int k) { narrow(value[k], pixel(tile, k) + place); });
  }
  template <typename Source>
  __device__ __forceinline__ void put_one(const Source&, const typename Source::Tile& tile, int k, int c,
                                          Acc value) const {
    narrow(value, pixel(tile, k) + at(c));
  }
  template <typename Stack>
  __device__ __forceinline__ Scalar* pixel(const Stack& tile, int k) const {  // of the first class
    return static_cast<Scalar*>(view.data) + tile.n * view.stride_n + tile.y(k) * view.stride_h +
           tile.x(k) * view.stride_w;
  }
};

// Stores to a tensor with a layout that DirectRows could read.
template <typename Scalar>
struct StoreRows : StoreAny<Scalar, typename AccOf<Scalar>::type> {
  using Acc = typename AccOf<Scalar>::type;

  template <typename Source>
  __device__ __forceinline__ void put(const Source&, const typename Source::Tile& tile, int64_t place,
                                      const Acc (&value)[kStack]) const {
    if (tile.has(0)) store_narrowed(value, this->pixel(tile, 0) + place);
  }
};

// Stores to a tensor with a layout that DirectPixels could read. Gradients take the place of the staged logits, which
// are not needed any more, and are copied to memory from there.
template <typename Scalar>
struct StorePixels : Store {
  using Acc = typename AccOf<Scalar>::type;

  __device__ __forceinline__ int at(int c) const { return c; }
  __device__ __forceinline__ int next(int c) const { return c + 1; }
  __device__ __forceinline__ void put(const DirectPixels<Scalar>& source, const Stacks<false>& tile, int c,
                                      const Acc (&value)[kStack]) const {
    tile.for_each([&](int k) { narrow(value[k], source.staged_at(k, c)); });
  }
  __device__ __forceinline__ void put_one(const DirectPixels<Scalar>& source, const Stacks<false>&, int k, int c,
                                          Acc value) const {
    narrow(value, source.staged_at(k, c));
  }
  __device__ __forceinline__ void finish(const DirectPixels<Scalar>& source) const {
    __syncthreads();
    source.copy(view, [](const auto* shared, auto* memory) { *memory = *shared; });
  }
};

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
