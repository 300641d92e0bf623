// Sources read the logits of label pixels, and sinks write their gradients: from and to a tensor of the labels' size,
// in one of three layouts, or a tensor of another size, which is resampled bilinearly.
#pragma once

#include "common/geometry.h"
#include "cuda/kernels/tile.cuh"

namespace bcmf::device {

// ---------------------------------------------------------------------------------------------------------------------
// Sources

// Reads single logits of the labels' size.
template <typename Scalar_>
struct DirectEntries {
  using Scalar = Scalar_;
  using Acc = typename AccOf<Scalar>::type;
  static constexpr int kAtOnce = 4;  // classes that are read together
  static constexpr int kBlocks = 2;  // of dense_backward, for which a multiprocessor has to have room
  const MapView& view;

  __device__ __forceinline__ explicit DirectEntries(const LossArgs& args) : view(args.logits) {}
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
  const Scalar* stack_[kStack];

  static BCMF_HOST_DEVICE Scalar* take(const LossArgs&, SharedCutter&) { return nullptr; }
  __device__ __forceinline__ DirectAny(const LossArgs& args, const Tile& tile, Scalar*) : Entries(args) {
    const Scalar* column = this->data() + tile.n * this->view.stride_n + clamp(tile.x(0), tile.W) * this->view.stride_w;
#pragma unroll
    for (int k = 0; k < kStack; ++k) stack_[k] = column + clamp(tile.y(k), tile.H) * this->view.stride_h;
  }
  // Reads class c of the thread's stack; z may hold anything beyond the border.
  __device__ __forceinline__ void stack(int c, Acc (&z)[kStack]) const {
#pragma unroll
    for (int k = 0; k < kStack; ++k) z[k] = own(k, c);
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
  static constexpr int kBlocks = 4;
  const Scalar* first_;

  static bool can_read(const MapView& view, const LossArgs& args) {
    return view.stride_w == 1 && args.W % kStack == 0 && begins_at<Scalar>(view, args, view.stride_c, kStack);
  }
  static BCMF_HOST_DEVICE Scalar* take(const LossArgs&, SharedCutter&) { return nullptr; }
  __device__ __forceinline__ DirectRows(const LossArgs& args, const Tile& tile, Scalar*) : Entries(args) {
    const int y = tile.has(0) ? tile.y(0) : tile.top, x = tile.has(0) ? tile.x(0) : tile.left;
    first_ = this->data() + tile.n * this->view.stride_n + y * this->view.stride_h + x;
  }
  __device__ __forceinline__ void stack(int c, Acc (&z)[kStack]) const {
    Scalar entries[kStack];
    load_pack(first_ + c * this->view.stride_c, entries);
#pragma unroll
    for (int k = 0; k < kStack; ++k) z[k] = widen(entries[k]);
  }
  __device__ __forceinline__ Acc own(int k, int c) const { return widen(first_[c * this->view.stride_c + k]); }
};

// Reads logits that are contiguous along classes, then along x (channels_last). The block first copies its tile to
// shared memory, whole rows at a time.
template <typename Scalar>
struct DirectPixels : DirectEntries<Scalar> {
  using Entries = DirectEntries<Scalar>;
  using typename Entries::Acc;
  using Tile = Stacks<false>;
  static constexpr int kBlocks = 4, kVector = 16 / sizeof(Scalar);
  Scalar* staged;  // (kRows, kColumns, C)
  const Tile& tile;
  int C;

  static bool can_read(const MapView& view, const LossArgs& args) {
    return view.stride_c == 1 && view.stride_w == args.C && args.W * args.C % kVector == 0 &&
           begins_at<Scalar>(view, args, 0, kVector);
  }
  static BCMF_HOST_DEVICE Scalar* take(const LossArgs& args, SharedCutter& shared) {
    return shared.take<Scalar>(kRows * kColumns * args.C);
  }
  __device__ __forceinline__ DirectPixels(const LossArgs& args, const Tile& tile, Scalar* staged)
      : Entries(args), staged(staged), tile(tile), C(static_cast<int>(args.C)) {
    copy(this->view, [](auto* shared, const auto* memory) { *shared = *memory; });
    __syncthreads();
  }
  __device__ __forceinline__ void stack(int c, Acc (&z)[kStack]) const {
#pragma unroll
    for (int k = 0; k < kStack; ++k) z[k] = own(k, c);
  }
  __device__ __forceinline__ Acc own(int k, int c) const { return widen(*staged_at(k, c)); }
  __device__ __forceinline__ Scalar* staged_at(int k, int c) const {
    return staged + (tile.row(k) * kColumns + tile.column(k)) * C + c;
  }
  // Calls f(shared, memory) for all of the tile, 16 bytes at a time. A row of the tile is a multiple of 16 bytes long,
  // as can_read has found a row of the image to be.
  template <typename F>
  __device__ __forceinline__ void copy(const MapView& to, F f) const {
    Scalar* corner =
        static_cast<Scalar*>(to.data) + tile.n * to.stride_n + tile.top * to.stride_h + tile.left * to.stride_w;
    constexpr int kPerRow = kThreads / kRows;  // threads to a row: no division by its length
    const int row = static_cast<int>(threadIdx.x) / kPerRow, own = static_cast<int>(threadIdx.x) % kPerRow * kVector;
    if (row >= tile.rows) return;
    Scalar *shared = staged + row * kColumns * C, *memory = corner + row * to.stride_h;
#pragma unroll 4
    for (int entry = own; entry < tile.columns * C; entry += kPerRow * kVector)
      f(reinterpret_cast<Words<Scalar, kVector>*>(shared + entry),
        reinterpret_cast<Words<Scalar, kVector>*>(memory + entry));
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

// Reads stacks of logits of another size. Mostly, all pixels of a stack lie between the same two rows of logits, which
// are then resampled along x once for all of them.
template <typename Scalar>
struct Resampled : ResampledEntries<Scalar> {
  using Entries = ResampledEntries<Scalar>;
  using typename Entries::Acc;
  using Tile = Stacks<false>;
  static constexpr int kAtOnce = 1, kBlocks = 2;  // the reads come from L1, registers are scarce
  const Scalar* first_;
  Tap<Acc> across, down[kStack];
  int64_t corners[2][2];  // offsets of the four logits around the stack's first pixel
  bool same_rows;

  static BCMF_HOST_DEVICE Scalar* take(const LossArgs&, SharedCutter&) { return nullptr; }
  __device__ __forceinline__ Resampled(const LossArgs& args, const Tile& tile, Scalar*)
      : Entries(args), first_(this->image(tile.n)), across(this->tap_x(clamp(tile.x(0), tile.W))), same_rows(true) {
#pragma unroll
    for (int k = 0; k < kStack; ++k) {
      down[k] = this->tap_y(clamp(tile.y(k), tile.H));
      same_rows = same_rows && down[k].first == down[0].first;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      corners[i / 2][i % 2] = (i / 2 ? this->below(down[0]) : down[0].first) * args.logits.stride_h +
                              (i % 2 ? this->after(across) : across.first) * args.logits.stride_w;
  }
  __device__ __forceinline__ void stack(int c, Acc (&z)[kStack]) const {
    if (same_rows) {
      const Scalar* map = first_ + c * this->args.logits.stride_c;
      const Acc above = mix(widen(map[corners[0][0]]), widen(map[corners[0][1]]), across.weight);
      const Acc below = mix(widen(map[corners[1][0]]), widen(map[corners[1][1]]), across.weight);
#pragma unroll
      for (int k = 0; k < kStack; ++k) z[k] = mix(above, below, down[k].weight);
    } else {
#pragma unroll
      for (int k = 0; k < kStack; ++k) z[k] = own(k, c);
    }
  }
  __device__ __forceinline__ Acc own(int k, int c) const {
    return this->between(first_ + c * this->args.logits.stride_c, across, down[k]);
  }
};

// Calls f(first, z) for groups of classes of a stack, z[j] being class first + j. Their reads are under way at the same
// time. Beyond the last class z is -inf.
template <typename Source, typename F>
__device__ __forceinline__ void for_classes(const Source& source, int C, F f) {
  constexpr int kAtOnce = Source::kAtOnce;
  using Acc = typename Source::Acc;
#pragma unroll 1
  for (int first = 0; first < C; first += kAtOnce) {
    Acc z[kAtOnce][kStack];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) source.stack(first + j < C ? first + j : C - 1, z[j]);
#pragma unroll
    for (int j = 1; j < kAtOnce; ++j)
#pragma unroll
      for (int k = 0; k < kStack; ++k) z[j][k] = first + j < C ? z[j][k] : static_cast<Acc>(-INFINITY);
    f(first, z);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Sinks take gradients class by class: either those of stacks, by `put`, with `finish` after the last class; or those
// of single pixels, by `set`, with `add` after each class.

// The members that all sinks into a tensor have in common.
struct Store {
  static constexpr bool kAdds = false;
  MapView view;

  static BCMF_HOST_DEVICE int64_t scratch() { return 0; }
  template <typename Acc>
  __device__ __forceinline__ void begin(const LossArgs&, const Tile&, Acc*) const {}
  template <typename Source>
  __device__ __forceinline__ void finish(const Source&) const {}
};

// Stores to a tensor with any strides.
template <typename Scalar, typename Acc_>
struct StoreAny : Store {
  using Acc = Acc_;

  template <typename Source>
  __device__ __forceinline__ void put(const LossArgs&, const Source&, const typename Source::Tile& tile, int c,
                                      const Acc (&value)[kStack]) const {
    Scalar* to = static_cast<Scalar*>(view.data) + tile.n * view.stride_n + c * view.stride_c;
    tile.for_each([&](int k) { narrow(value[k], to + tile.y(k) * view.stride_h + tile.x(k) * view.stride_w); });
  }
  __device__ __forceinline__ void clear() const {}
  __device__ __forceinline__ void set(const Tile& tile, int row, int column, int c, Acc value) const {
    Scalar* to = static_cast<Scalar*>(view.data) + tile.n * view.stride_n + c * view.stride_c;
    narrow(value, to + (tile.top + row) * view.stride_h + (tile.left + column) * view.stride_w);
  }
  __device__ __forceinline__ void add(const LossArgs&, const Tile&, int) const {}
};

// Stores to a tensor with a layout that DirectRows could read.
template <typename Scalar>
struct StoreRows : Store {
  using Acc = typename AccOf<Scalar>::type;

  template <typename Source>
  __device__ __forceinline__ void put(const LossArgs&, const Source&, const typename Source::Tile& tile, int c,
                                      const Acc (&value)[kStack]) const {
    if (!tile.has(0)) return;
    Scalar* to = static_cast<Scalar*>(view.data) + tile.n * view.stride_n + c * view.stride_c;
    Scalar entries[kStack];
#pragma unroll
    for (int k = 0; k < kStack; ++k) narrow(value[k], &entries[k]);
    store_pack(entries, to + tile.y(0) * view.stride_h + tile.x(0));
  }
};

// Stores to a tensor with a layout that DirectPixels could read. Gradients take the place of the staged logits, which
// are not needed any more, and are copied to memory from there.
template <typename Scalar>
struct StorePixels : Store {
  using Acc = typename AccOf<Scalar>::type;

  __device__ __forceinline__ void put(const LossArgs&, const DirectPixels<Scalar>& source, const Stacks<false>& tile,
                                      int c, const Acc (&value)[kStack]) const {
    tile.for_each([&](int k) { narrow(value[k], source.staged_at(k, c)); });
  }
  __device__ __forceinline__ void finish(const DirectPixels<Scalar>& source) const {
    __syncthreads();
    source.copy(view, [](const auto* shared, auto* memory) { *memory = *shared; });
  }
};

// The logits along an axis (cells) that some label pixels lie between.
struct Cells {
  int64_t first, count;
};
// Finds the cells of the label pixels first..last.
BCMF_HOST_DEVICE Cells cells_between(int64_t first, int64_t last, int64_t in, int64_t out, bool align_corners) {
  const int64_t from = axis_tap<double>(first, in, out, align_corners).first;
  return {from, axis_tap<double>(last, in, out, align_corners).second - from + 1};
}

// Resampling along an axis of a tile: weight[i] is that of the second cell of label pixel i, and start[j + 1] is the
// first label pixel whose first cell is j, or a later one. Pixels and cells are counted from the tile's first.
template <typename Acc>
struct CellAxis {
  Acc* weight;
  int* start;

  // Fills in both for `length` label pixels from `begin` on; all threads of the block call it. `first` is scratch
  // memory.
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
    __syncthreads();  // `start` and `first` are read as soon as this function returns
  }
  // Returns what cell j gets from values[i * stride], for every `step`-th of its label pixels i from the `part`-th on.
  __device__ __forceinline__ Acc gather(int j, const Acc* values, int stride, int part = 0, int step = 1) const {
    Acc sum = 0;
    for (int i = start[j] + part; i < start[j + 1]; i += step) sum += weight[i] * values[i * stride];
    for (int i = start[j + 1] + part; i < start[j + 2]; i += step) sum += (1 - weight[i]) * values[i * stride];
    return sum;
  }
};

// Takes gradients back to logits of another size, of which there are no more than labels along either axis. It stores
// what a tile adds to each cell that it touches; low_gather_tiles adds up the tiles.
template <typename Acc_>
struct TileCells {
  using Acc = Acc_;
  static constexpr bool kAdds = true;
  static constexpr int kDown = kRows + 2, kAcross = kColumns + 2;  // the most cells that a tile touches
  static constexpr int kStacks = kRows / kStack;                   // stacks below each other
  Acc* partials;                                                   // (tiles, C, cells_down, cells_across)
  int64_t cells_down, cells_across;                                // of the tile that touches the most
  int rows, columns;
  Acc *values, *sums;  // gradients of a class (kRows, kColumns), and their sums along y (kDown, kColumns)
  CellAxis<Acc> down, across;
  bool whole_stacks;         // all pixels of a stack lie between the same two rows of cells, for each stack
  int stack_first[kStacks];  // if so, the upper row of each

  static BCMF_HOST_DEVICE int64_t scratch() { return (kRows + kDown) * kColumns; }
  __device__ __forceinline__ void begin(const LossArgs& args, const Tile& tile, Acc* scratch) {
    BCMF_SHARED(Acc, weights, kRows + kColumns);
    values = scratch, sums = scratch + kRows * kColumns;
    int* firsts = reinterpret_cast<int*>(scratch);  // only needed in this function
    BCMF_SHARED(int, starts, kDown + 2 + kAcross + 2);
    down = {weights, starts};
    across = {weights + kRows, starts + kDown + 2};
    const Cells y = cells_between(tile.top, tile.top + tile.rows - 1, args.h, args.H, args.align_corners);
    const Cells x = cells_between(tile.left, tile.left + tile.columns - 1, args.w, args.W, args.align_corners);
    rows = static_cast<int>(y.count), columns = static_cast<int>(x.count);
    across.fill(tile.left, tile.columns, x, args.w, args.W, args.align_corners, firsts);
    down.fill(tile.top, tile.rows, y, args.h, args.H, args.align_corners, firsts);
    whole_stacks = true;
#pragma unroll
    for (int i = 0; i < kStacks; ++i) {
      const int last = i * kStack + kStack < tile.rows ? i * kStack + kStack - 1 : tile.rows - 1;
      stack_first[i] = i * kStack < tile.rows ? firsts[i * kStack] : -2;  // no row of cells
      whole_stacks = whole_stacks && (i * kStack >= tile.rows || firsts[last] == stack_first[i]);
    }
    __syncthreads();  // `firsts` may be written again
  }
  template <typename Source>
  __device__ __forceinline__ void put(const LossArgs& args, const Source& source, const Stacks<false>& tile, int c,
                                      const Acc (&value)[kStack]) const {
    if (whole_stacks) {
      Acc above = 0, below = 0;  // added to the cells above and below the stack
      tile.for_each([&](int k) {
        above += (1 - source.down[k].weight) * value[k];
        below += source.down[k].weight * value[k];
      });
      const int stack = tile.first_row / kStack;
      values[stack * kColumns + tile.first_column] = above;
      values[(kStacks + stack) * kColumns + tile.first_column] = below;
    } else {
      tile.for_each([&](int k) { values[tile.row(k) * kColumns + tile.column(k)] = value[k]; });
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * kColumns; i += kThreads) {
      if (i % kColumns >= tile.columns) continue;
      sums[i] = whole_stacks ? sum_of_stacks(i / kColumns, values + i % kColumns)
                             : down.gather(i / kColumns, values + i % kColumns, kColumns);
    }
    sum_across(args, c, [](Acc& cell, Acc sum) { cell = sum; });
  }
  template <typename Source>
  __device__ __forceinline__ void finish(const Source&) const {}

  // Clears the gradients of all pixels, for those that will not be set. All threads of the block call it.
  __device__ __forceinline__ void clear() const {
    for (int i = threadIdx.x; i < kRows * kColumns; i += kThreads) values[i] = 0;
    __syncthreads();  // `set` may be called at once
  }
  __device__ __forceinline__ void set(const Tile&, int row, int column, int, Acc value) const {
    values[row * kColumns + column] = value;
  }
  // Adds the gradients that are set to what `put` has stored in another kernel.
  __device__ __forceinline__ void add(const LossArgs& args, const Tile& tile, int c) const {
    __syncthreads();
    for (int i = threadIdx.x; i < rows * kColumns; i += kThreads)
      if (i % kColumns < tile.columns) sums[i] = down.gather(i / kColumns, values + i % kColumns, kColumns);
    sum_across(args, c, [](Acc& cell, Acc sum) { cell += sum; });
  }

 private:
  __device__ __forceinline__ Acc sum_of_stacks(int row, const Acc* column) const {
    Acc sum = 0;
#pragma unroll
    for (int i = 0; i < kStacks; ++i) {
      if (stack_first[i] == row) sum += column[i * kColumns];
      if (stack_first[i] == row - 1) sum += column[(kStacks + i) * kColumns];
    }
    return sum;
  }
  // Waits for `sums`, and gives each cell its sum of them. Four neighbouring threads share a cell, because there are
  // few cells.
  template <typename F>
  __device__ __forceinline__ void sum_across(const LossArgs& args, int c, F store) const {
    constexpr int kParts = 4;
    __syncthreads();
    Acc* map = partials + (blockIdx.x * args.C + c) * cells_down * cells_across;
    for (int first = 0; first < kParts * rows * columns; first += kThreads) {
      const int i = first + static_cast<int>(threadIdx.x), cell = i / kParts;
      const int row = cell / columns, column = cell % columns;
      Acc sum = row < rows ? across.gather(column, sums + row * kColumns, 1, i % kParts, kParts) : Acc(0);
      for (int lanes = 1; lanes < kParts; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
      if (row < rows && i % kParts == 0) store(map[row * cells_across + column], sum);
    }
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

// Adds up, for each logit, what the tiles that touch it have stored in partials (tiles, C, cells_down, cells_across),
// in the order of the tiles.
template <typename Scalar>
__global__ void __launch_bounds__(kThreads, 1)
    low_gather_tiles(const __grid_constant__ LossArgs args, const typename AccOf<Scalar>::type* partials,
                     int64_t cells_down, int64_t cells_across) {
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
