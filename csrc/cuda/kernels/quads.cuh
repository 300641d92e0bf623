// dense_backward of upsampled logits. A thread owns a class and a column of quads, the pixels between the same four
// logits (cells), and keeps their sums in registers.
#pragma once

#include "cuda/kernels/dense.cuh"
#include "cuda/kernels/upsampled.cuh"

namespace bcmf::device {

// What the backward knows of a label pixel, in shared memory.
template <typename Acc>
struct alignas(16) PixelTerms {
  Acc reference, shift, of_p, pull;  // shift: exp_shift of PixelStats::rest
};

// Its label, and its place in the list of those that have extras.
struct alignas(8) PixelClasses {
  int label, place;
};

// What two neighbouring cells get from the pixels between them.
template <typename Acc>
struct alignas(2 * sizeof(Acc)) QuadSums {
  Acc first, second;
};

// The shared memory of dense_backward_quads.
template <typename Acc>
struct QuadMemory {
  using Across = TileAxis<Acc, kColumns>;
  static constexpr int kPitch = kRows + 1;  // so that neighbouring threads use other banks
  static constexpr int kBudget = 16 << 10;  // bytes of cells and sums, if that is enough for a class
  int classes;                              // that are staged together
  int cells_down, cells_across;             // the most of a tile
  SharedArray<PixelTerms<Acc>> pixels;      // (kColumns, kPitch)
  SharedArray<PixelClasses> classes_of;     // the same
  CellMemory<Acc> cells;
  SharedArray<Acc> sums;          // (2, classes, pitch): of left cells, then of right ones
  SharedArray<uint16_t> order;    // (classes,)
  SharedArray<unsigned> present;  // the classes of the tile's labels
  SparseMemory<Acc> sparse;

  QuadMemory(const LossArgs& args, SharedCutter& shared)
      : classes(classes_together(args)),
        cells_down(most_cells(kRows, args.h, args.H)),
        cells_across(most_cells(kColumns, args.w, args.W)),
        pixels(shared.take<PixelTerms<Acc>>(kColumns * kPitch + Across::kShifts)),
        classes_of(shared.take<PixelClasses>(kColumns * kPitch + Across::kShifts)),
        cells(args, classes, shared),
        sums(shared.take<Acc>(2 * classes * most_pitch(args))),
        order(shared.take<uint16_t>(classes)),
        present(shared.take<unsigned>(ClassSet::kWords)),
        sparse(args, shared) {}
  static int classes_together(const LossArgs& args) {
    const int fit = kBudget / static_cast<int>(3 * most_pitch(args) * sizeof(Acc));
    return fit < 1 ? 1 : fit < args.C ? fit : static_cast<int>(args.C);
  }
  // Where a column of pixels begins, which is shifted for the same reason.
  static __device__ __forceinline__ int at(int column, int quad) { return column * kPitch + Across::shift_of(quad); }
};

// The sums of a column of quads, for one class. kFinite: all logits of the chunk are. kSpecial: some pixels of the tile
// may have the class as their label, or extras of it. Otherwise it is the label of all of them, or of none
// (minus_label), and has no extras.
template <typename Entries, bool kFinite, bool kSpecial>
struct QuadColumn {
  using Acc = typename Entries::Acc;
  const QuadMemory<Acc>& memory;
  const TileCells<Entries>& cells;
  const SparseGradient<Entries>& sparse;
  int c, rank;      // the class, and which one it is of those that have extras, or -1
  Acc minus_label;  // -1 if it is the label of all pixels, else 0

  // Adds the gradient of a pixel to what the cells above and below it get. Logits are mixed as the forward does, along
  // x first, so that they have its bits.
  __device__ __forceinline__ void add_pixel(int place, const AxisWeights<Acc>& down, Acc upper, Acc lower,
                                            QuadSums<Acc>& to) const {
    PixelTerms<Acc> pixel;
    load_whole(memory.pixels.data() + place, pixel);
    const Acc p = exp_shifted(mix<kFinite>(upper, lower, down) - pixel.reference, pixel.shift);
    Acc value = kFinite || pixel.of_p != 0 ? pixel.of_p * p : Acc(0);  // p of an ignored pixel may be NaN
    if constexpr (kSpecial) {
      const PixelClasses of_pixel = memory.classes_of.data()[place];
      if (of_pixel.label == c) value -= pixel.pull;
      if (of_pixel.place != sparse.kNone && rank >= 0) value += sparse.extra(rank, of_pixel.place);
    } else {
      value += minus_label * pixel.pull;
    }
    to.first += down.first * value, to.second += down.second * value;
  }
  // The same for columns x..x+kCount-1 of quad (i, j), and to the left and to the right of those cells.
  template <int kCount>
  __device__ __forceinline__ void add_columns(int x, int i, int j, const QuadSums<Acc>& top,
                                              const QuadSums<Acc>& bottom, QuadSums<Acc>& above,
                                              QuadSums<Acc>& below) const {
    const AxisWeights<Acc>* weights = cells.across.weights + x + cells.across.shift_of(j);
    Acc upper[kCount], lower[kCount];
    QuadSums<Acc> to[kCount] = {};
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const AxisWeights<Acc> across = weights[k];
      upper[k] = mix<kFinite>(top.first, top.second, across);
      lower[k] = mix<kFinite>(bottom.first, bottom.second, across);
      keep(upper[k]), keep(lower[k]);
    }
    int y = cells.down.start[i], place = memory.at(x, j) + y;
    const int end = cells.down.start[i + 1], shift = cells.down.shift_of(i);
    keep(place);
    const auto add_row = [&](int y, int place) {
      const AxisWeights<Acc> down = cells.down.weights[y + shift];
#pragma unroll
      for (int k = 0; k < kCount; ++k) add_pixel(place + k * memory.kPitch, down, upper[k], lower[k], to[k]);
    };
#pragma unroll 1
    for (; y < end; ++y, ++place) add_row(y, place);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const AxisWeights<Acc> across = weights[k];
      above.first += across.first * to[k].first, above.second += across.second * to[k].first;
      below.first += across.first * to[k].second, below.second += across.second * to[k].second;
    }
  }

  // Stores the sums of quad column j, for each row of cells those of its left and right cell.
  __device__ __forceinline__ void run(int of_chunk, int j) const {
    constexpr int kAtOnce = kSpecial ? 1 : 4;  // columns of pixels
    const int columns = cells.across.cells, right = j + 1 < columns ? 1 : 0;
    const int begin = cells.across.start[j], end = cells.across.start[j + 1];
    const Acc* row = cells.staged + of_chunk * cells.pitch + j;
    Acc* left = memory.sums.data() + of_chunk * cells.pitch + j;
    const auto store = [&](const QuadSums<Acc>& sums) {
      left[0] = sums.first, left[memory.classes * cells.pitch] = sums.second;
      left += columns;
    };
    QuadSums<Acc> above = {}, top = {row[0], row[right]};  // what the upper cells get from above; their logits
    for (int i = 0; i < cells.down.quads; ++i) {
      if (i + 1 < cells.down.cells) row += columns;
      const QuadSums<Acc> bottom = {row[0], row[right]};
      QuadSums<Acc> below = {};
      int x = begin;
#pragma unroll 1
      for (; x + kAtOnce <= end; x += kAtOnce) add_columns<kAtOnce>(x, i, j, top, bottom, above, below);
#pragma unroll 1
      for (; kAtOnce > 1 && x < end; ++x) add_columns<1>(x, i, j, top, bottom, above, below);
      store(above);
      above = below, top = bottom;
    }
    if (cells.down.quads < cells.down.cells) store(above);
  }
};

// Lists the classes of a chunk, those for which `is_special` is true behind the others, whose number it returns. All
// threads of the block call it.
template <typename F>
__device__ __forceinline__ int order_classes(int classes, F is_special, uint16_t* order) {
  int plain = 0, specials = 0;
  for (int first = 0; first < classes; first += kThreads) {
    const int of_chunk = first + static_cast<int>(threadIdx.x);
    const bool special = of_chunk < classes && is_special(of_chunk);
    int counts;  // of plain classes, and in the upper half of special ones
    const int before = scan_block(of_chunk >= classes ? 0 : special ? 1 << 16 : 1, &counts);
    if (of_chunk < classes)
      order[special ? classes - 1 - specials - (before >> 16) : plain + (before & 0xffff)] =
          static_cast<uint16_t>(of_chunk);
    plain += counts & 0xffff, specials += counts >> 16;
  }
  return plain;
}

// Writes, of each tile, what it adds to the gradients of its cells: partials (tiles, C, cells_down, cells_across). The
// steps cpg_residuals, cpg_shares and sparse_backward are part of this kernel.
template <typename Scalar>
__global__ void __launch_bounds__(kThreads, 2)
    dense_backward_quads(const __grid_constant__ LossArgs args, const __grid_constant__ Marks marks,
                         const __grid_constant__ QuadMemory<typename AccOf<Scalar>::type> memory,
                         typename AccOf<Scalar>::type* partials) {
  using Entries = ResampledEntries<Scalar>;
  using Acc = typename Entries::Acc;
  const Stacks<false> tile(args);
  const Entries entries(args);
  SparseGradient<Entries> sparse(args, memory.sparse);
  const TileCells<Entries> cells(args, tile, memory.cells);
  const ClassSet present = {memory.present.data()};
  for (int i = threadIdx.x; i < ClassSet::kWords; i += kThreads) present.words[i] = 0;
  const int C = static_cast<int>(args.C);
  for (int begin = 0, end = 0; begin < C; begin = end) {
    end = sparse.find_extras(marks, tile, entries, begin);
    __syncthreads();  // the axes and the empty set are there
    if (begin == 0) {
      const Patch* patch = tile.has_patch() ? marks.patch(tile.n, tile.y(0), tile.x(0)) : nullptr;
      int labels[kStack] = {kIgnored, kIgnored, kIgnored, kIgnored};
      const int patch_id = patch ? marks.id_of(*patch) : kIgnored;
      marks.load(tile, patch_id, labels);
      PixelStats<Acc> stats[kStack];
      load_stats(args, tile, stats);
      const Pulls<Acc> pulls(args, tile, patch, labels, sparse,
                             [&](int k) { return stats[k].loss(entries.at(tile.n, tile.y(k), tile.x(k), labels[k])); });
      tile.for_each([&](int k) {
        const int quad = cells.across.cell[tile.column(k)] - cells.across.first;
        const int place = memory.at(tile.column(k), quad) + tile.row(k);
        // The gradient is 0 where of_p is. But the logits of another chunk of classes may have made the statistics NaN:
        // by these ones p is 0.
        const PixelStats<Acc> known = pulls.of_p[k] != 0 ? stats[k] : PixelStats<Acc>{Acc(INFINITY), Acc(0)};
        memory.pixels.data()[place] = {known.reference, exp_shift(known.rest), pulls.of_p[k], pulls.pull[k]};
        memory.classes_of.data()[place] = {labels[k], pulls.place[k]};
        const bool first =
            patch_id == kMixed ? k == 0 || labels[k] != labels[k - 1] : threadIdx.x % kWarp == 0 && k == 0;
        if (first && labels[k] >= 0) present.add(labels[k]);
      });
    }
    const int label = marks.id_of(*marks.patch(tile.n, tile.top, tile.left));  // of all pixels, if not mixed
    const bool mixed = sparse.any() || differ(marks, tile, 0);
    for (int c = begin; c < end; c += memory.classes) {
      const int classes = end - c < memory.classes ? end - c : memory.classes;
      __syncthreads();  // all labels are there, and other cells are not needed any more
      const bool careful = any_of_block(!cells.load(args, tile, entries, c, classes));
      const int quads = cells.across.quads;
      const auto is_special = [&](int i) { return present.has(c + i) || sparse.rank(c + i) >= 0; };
      const int plain = careful ? 0 : mixed ? order_classes(classes, is_special, memory.order.data()) : classes;
      __syncthreads();  // the order is there
      // Special classes begin at another warp, so that no warp has both.
      const int plain_items = plain * quads, first_special = (plain_items + kWarp - 1) / kWarp * kWarp;
      const int items = first_special + (classes - plain) * quads;
      for (int i = threadIdx.x; i < items; i += kThreads) {
        const bool special = i >= first_special;
        if (!special && i >= plain_items) continue;
        const int of_kind = special ? i - first_special : i, kind = special ? classes - plain : plain;
        const int j = of_kind / kind, place = (special ? plain : 0) + of_kind % kind;
        const int of_chunk = careful || !mixed ? place : memory.order.data()[place], own = c + of_chunk;
        const int rank = special ? sparse.rank(own) : -1;
        const Acc minus_label = own == label ? Acc(-1) : Acc(0);
        if (!special)
          QuadColumn<Entries, true, false>{memory, cells, sparse, own, rank, minus_label}.run(of_chunk, j);
        else if (careful)
          QuadColumn<Entries, false, true>{memory, cells, sparse, own, rank, minus_label}.run(of_chunk, j);
        else
          QuadColumn<Entries, true, true>{memory, cells, sparse, own, rank, minus_label}.run(of_chunk, j);
      }
      __syncthreads();  // all sums are there
      Acc* of_tile = partials + (blockIdx.x * args.C + c) * (memory.cells_down * memory.cells_across);
      for (int i = threadIdx.x; i < classes * cells.count(); i += kThreads) {
        const int of_chunk = i / cells.count(), cell = i % cells.count();
        const int row = cell / cells.across.cells, column = cell % cells.across.cells;
        const Acc *to_left = memory.sums.data() + of_chunk * cells.pitch + cell,
                  *to_right = to_left + memory.classes * cells.pitch;
        of_tile[(of_chunk * memory.cells_down + row) * memory.cells_across + column] =
            (column > 0 ? to_right[-1] : Acc(0)) + (column < quads ? to_left[0] : Acc(0));
      }
    }
  }
}

}  // namespace bcmf::device
