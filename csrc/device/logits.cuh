// Where logits come from and gradients go to: a tensor of the labels' size, in one of three layouts, or one of another
// size, resampled bilinearly.
#pragma once

#include "geometry.cuh"
#include "tile.cuh"

namespace bcmf::device {

// ---------------------------------------------------------------------------------------------------------------------
// Sources: logits of a stack of label pixels

// Single logits of the labels' size.
template <typename Scalar_>
struct DirectEntries {
  using Scalar = Scalar_;
  using Acc = typename AccOf<Scalar>::type;
  static constexpr int kAtOnce = 4;  // classes that are read together
  static constexpr int kBlocks = 2;  // of gradient_tiles, on a multiprocessor at least
  const MapView& view;

  __device__ __forceinline__ explicit DirectEntries(const LossArgs& args) : view(args.logits) {}
  __device__ __forceinline__ Acc at(int64_t n, int y, int x, int c) const {
    return widen(data()[n * view.stride_n + c * view.stride_c + y * view.stride_h + x * view.stride_w]);
  }
  __device__ __forceinline__ const Scalar* data() const { return static_cast<const Scalar*>(view.data); }
};

// Any strides; fast where neighbours along x are neighbours in memory.
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
  // Class c of the thread's stack; anything beyond the border.
  __device__ __forceinline__ void stack(int c, Acc (&z)[kStack]) const {
#pragma unroll
    for (int k = 0; k < kStack; ++k) z[k] = own(k, c);
  }
  // Of one pixel of the stack.
  __device__ __forceinline__ Acc own(int k, int c) const { return widen(stack_[k][c * this->view.stride_c]); }
};

// Contiguous along x, with rows that begin at multiples of a stack: a stack is read at once.
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

// Contiguous along classes, then x (channels_last): the block copies its tile to shared memory, whole rows at a time.
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
  // f(shared, memory) for all of the tile, 16 bytes at a time: a row of it has a multiple of that if one of the image
  // does.
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

// AxisTap in few registers: its second index is the first's neighbour, if there is one.
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

// Single logits of another size.
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

// The two rows of logits that a stack lies between are mostly the same for all its pixels: they are resampled along x
// once then.
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

// f(first, z) for groups of classes of a stack, z[j] being class first + j: their reads are under way together. Beyond
// the last class z is -inf.
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
// Sinks: where gradients of a class go: those of a stack, by `put`, with `finish` after the last class; or those of
// single pixels, by `set`, with `add` after each class.

// What those to a tensor have in common.
struct Store {
  static constexpr bool kAdds = false;
  MapView view;

  static BCMF_HOST_DEVICE int64_t scratch() { return 0; }
  template <typename Acc>
  __device__ __forceinline__ void begin(const LossArgs&, const Tile&, Acc*) const {}
  template <typename Source>
  __device__ __forceinline__ void finish(const Source&) const {}
};

// To a tensor of any strides.
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

// To a tensor that DirectRows could read.
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

// To a tensor that DirectPixels could read: in place of the staged logits, which are not needed any more, and from
// there to memory.
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
  // What cell j gets of values[i * stride], for every `step`-th i from the `part`-th on.
  __device__ __forceinline__ Acc gather(int j, const Acc* values, int stride, int part = 0, int step = 1) const {
    Acc sum = 0;
    for (int i = start[j] + part; i < start[j + 1]; i += step) sum += weight[i] * values[i * stride];
    for (int i = start[j + 1] + part; i < start[j + 2]; i += step) sum += (1 - weight[i]) * values[i * stride];
    return sum;
  }
};

// Gradients that go back to logits of which there are no more than labels, along either axis: what a tile adds to each
// logit cell that it touches. join_tiles adds the tiles up.
template <typename Acc_>
struct TileCells {
  using Acc = Acc_;
  static constexpr bool kAdds = true;
  static constexpr int kDown = kRows + 2, kAcross = kColumns + 2;  // the most cells that a tile touches
  static constexpr int kStacks = kRows / kStack;                   // below each other
  Acc* partials;                                                   // (tiles, C, cells_down, cells_across)
  int64_t cells_down, cells_across;                                // of the tile that touches most
  int rows, columns;
  Acc *values, *sums;  // of a class, (kRows, kColumns); and their sums along y, (kDown, kColumns)
  CellAxis<Acc> down, across;
  bool whole_stacks;         // no stack's pixels lie between different rows of cells
  int stack_first[kStacks];  // if so, the row above each

  static BCMF_HOST_DEVICE int64_t scratch() { return (kRows + kDown) * kColumns; }
  __device__ __forceinline__ void begin(const LossArgs& args, const Tile& tile, Acc* scratch) {
    BCMF_SHARED(Acc, weights, kRows + kColumns);
    values = scratch, sums = scratch + kRows * kColumns;
    int* firsts = reinterpret_cast<int*>(scratch);  // read no more after this
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
      stack_first[i] = i * kStack < tile.rows ? firsts[i * kStack] : -2;  // no cell's
      whole_stacks = whole_stacks && (i * kStack >= tile.rows || firsts[last] == stack_first[i]);
    }
    __syncthreads();  // `firsts` may be written again
  }
  template <typename Source>
  __device__ __forceinline__ void put(const LossArgs& args, const Source& source, const Stacks<false>& tile, int c,
                                      const Acc (&value)[kStack]) const {
    if (whole_stacks) {
      Acc above = 0, below = 0;  // what the stack adds to the cells above and below
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

  // Of the pixels that are not set. By all threads of the block.
  __device__ __forceinline__ void clear() const {
    for (int i = threadIdx.x; i < kRows * kColumns; i += kThreads) values[i] = 0;
    __syncthreads();
  }
  __device__ __forceinline__ void set(const Tile&, int row, int column, int, Acc value) const {
    values[row * kColumns + column] = value;
  }
  // What is set, to what `put` has stored in another launch.
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
  // Waits for `sums`, and gives each cell its sum of them. Four neighbouring threads to a cell: there are few of those.
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
    const MapView& v = args.grad;
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
