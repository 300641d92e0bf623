// Logits that are fewer than labels along both axes, or as many along one. The labels of a tile lie between few of
// them, its cells, which a block copies to shared memory.
#pragma once

#include "cuda/kernels/logits.cuh"

namespace bcmf::device {

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

// The shared memory of TileCells.
template <typename Acc>
struct CellMemory {
  SharedArray<AxisWeights<Acc>> weights;
  SharedArray<int> numbers;
  SharedArray<Acc> staged;  // (classes, most_pitch)

  CellMemory(const LossArgs& args, int classes, SharedCutter& shared)
      : weights(shared.take<AxisWeights<Acc>>(TileAxis<Acc, kRows>::kSlots + TileAxis<Acc, kColumns>::kSlots)),
        numbers(shared.take<int>(2 * (kRows + kColumns) + 2)),
        staged(shared.take<Acc>(classes * most_pitch(args))) {}
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
  __device__ __forceinline__ TileCells(const LossArgs& args, const Tile& tile, const CellMemory<Acc>& memory)
      : staged(memory.staged.data()) {
    int* numbers = memory.numbers.data();
    down.cell = numbers, across.cell = down.cell + kRows;
    down.start = across.cell + kColumns, across.start = down.start + kRows + 1;
    down.weights = memory.weights.data(), across.weights = down.weights + decltype(down)::kSlots;
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
  static constexpr int kAtOnce = 4, kBlocks = 2, kForwardBlocks = 2;
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
    int classes;  // that are staged together
    CellMemory<Acc> cells;
  };
  static Staged take(const LossArgs& args, SharedCutter& shared) {
    const int fit = kBudget / static_cast<int>(most_pitch(args) * sizeof(Acc)) / kAtOnce * kAtOnce;
    const int classes = fit < kAtOnce ? kAtOnce : fit < args.C ? fit : static_cast<int>(args.C);
    return {classes, CellMemory<Acc>(args, classes, shared)};
  }
  __device__ __forceinline__ Upsampled(const LossArgs& args, const Tile& tile, const Staged& memory)
      : Entries(args), tile(tile), cells(args, tile, memory.cells), most(memory.classes), advances(0) {
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

}  // namespace bcmf::device
