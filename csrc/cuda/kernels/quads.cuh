// dense_backward of logits that are fewer than labels along both axes, or as many along one. A thread owns a class and
// a column of quads, the pixels between the same four logits (cells), and keeps their sums in registers.
#pragma once

#include "cuda/kernels/dense.cuh"

namespace bcmf::device {

// What the backward knows of a label pixel, in shared memory.
template <typename Acc>
struct alignas(16) PixelTerms {
  Acc reference, scaled_rest, of_p, pull;
};

// The shared memory of dense_backward_quads.
template <typename Acc>
struct QuadMemory {
  static constexpr int kPitch = kRows + 1, kShifts = 8;  // so that neighbouring threads use other banks
  static constexpr int kBudget = 16 << 10;               // bytes of cells and sums, if that is enough for a class
  int classes;                                           // that are staged together
  int cells_down, cells_across;                          // the most of a tile
  SharedArray<PixelTerms<Acc>> pixels;                   // (kColumns, kPitch)
  SharedArray<int> labels;                               // (kColumns, kPitch)
  SharedArray<Acc> staged;                               // (classes, cells)
  SharedArray<Acc> sums;                                 // (classes, cells_down, quads, 2)
  SparseMemory<Acc> sparse;

  QuadMemory(const LossArgs& args, SharedCutter& shared)
      : cells_down(most_cells(kRows, args.h, args.H)),
        cells_across(most_cells(kColumns, args.w, args.W)),
        sparse(args, shared) {
    const int cells = cells_down * cells_across, fit = kBudget / static_cast<int>(3 * cells * sizeof(Acc));
    classes = fit < 1 ? 1 : fit < args.C ? fit : static_cast<int>(args.C);
    pixels = shared.take<PixelTerms<Acc>>(kColumns * kPitch + kShifts);
    labels = shared.take<int>(kColumns * kPitch);
    staged = shared.take<Acc>(classes * cells);
    sums = shared.take<Acc>(2 * classes * cells);
  }
  // Where a column of pixels begins, which is shifted for the same reason.
  static __device__ __forceinline__ int at(int column, int quad) {
    return column * kPitch + (quad < kShifts ? quad : kShifts);
  }
};

// The sums of a column of quads, for one class.
template <typename Entries, bool kCareful, bool kMixed>
struct QuadColumn {
  using Acc = typename Entries::Acc;
  const QuadMemory<Acc>& memory;
  const TileCells<Entries>& cells;
  const SparseGradient<Entries>& sparse;
  int c, held;      // the class, and which one it is of those that have extras, or -1
  Acc minus_label;  // -1 if the class is the label of all pixels, else 0; not if kMixed

  // Logits are mixed as the forward does, along x first, so that they have its bits.
  static __device__ __forceinline__ Acc mixed(Acc a, Acc b, Acc rest, Acc weight) {
    return kCareful ? mix(a, b, weight) : mix_finite(a, b, rest, weight);
  }
  // Adds the gradients of a column of pixels, rows begin..end-1 of column x of quad j, to what the cells above and
  // below get.
  __device__ __forceinline__ void add_column(int x, int j, int begin, int end, Acc upper, Acc lower, Acc& to_upper,
                                             Acc& to_lower) const {
    const PixelTerms<Acc>* pixels = memory.pixels.data() + memory.at(x, j);
    const int* labels = memory.labels.data() + x * memory.kPitch;
#pragma unroll 4
    for (int y = begin; y < end; ++y) {
      const PixelTerms<Acc> pixel = pixels[y];
      const Acc weight = cells.down.weight[y], rest = cells.down.rest[y];
      const Acc p = exp_scaled(mixed(upper, lower, rest, weight) - pixel.reference, pixel.scaled_rest);
      Acc value = kCareful && pixel.of_p == 0 ? Acc(0) : pixel.of_p * p;  // 0 * NaN of an ignored pixel is 0 here
      if constexpr (kMixed) {
        if (labels[y] == c) value -= pixel.pull;
        if (held >= 0) {
          const int place = sparse.place(y, x);
          if (place != sparse.kNone) value += sparse.extra(held, place);
        }
      } else {
        value += minus_label * pixel.pull;
      }
      to_upper += rest * value;
      to_lower += weight * value;
    }
  }

  // Stores the sums of quad column j, for each row of cells those of its left and right cell.
  __device__ __forceinline__ void run(int of_chunk, int j) const {
    const int columns = cells.across.cells, right = j + 1 < columns ? 1 : 0;
    const Acc* top = cells.staged + of_chunk * cells.count() + j;
    Acc* sums = memory.sums.data() + 2 * (of_chunk * cells.count() + j);
    Acc to_left = 0, to_right = 0;  // what the upper cells get from the quads above and below them
    for (int i = 0; i < cells.down.quads; ++i) {
      const Acc* bottom = i + 1 < cells.down.cells ? top + columns : top;
      Acc next_left = 0, next_right = 0;
      for (int x = cells.across.start[j]; x < cells.across.start[j + 1]; ++x) {
        const Acc weight = cells.across.weight[x], rest = cells.across.rest[x];
        Acc to_upper = 0, to_lower = 0;
        add_column(x, j, cells.down.start[i], cells.down.start[i + 1], mixed(top[0], top[right], rest, weight),
                   mixed(bottom[0], bottom[right], rest, weight), to_upper, to_lower);
        to_left += rest * to_upper, to_right += weight * to_upper;
        next_left += rest * to_lower, next_right += weight * to_lower;
      }
      sums[0] = to_left, sums[1] = to_right;
      to_left = next_left, to_right = next_right;
      top = bottom, sums += 2 * columns;
    }
    if (cells.down.quads < cells.down.cells) sums[0] = to_left, sums[1] = to_right;
  }
};

// Writes, of each tile, what it adds to the gradients of its cells: partials (tiles, C, cells_down, cells_across). The
// steps cpg_residuals, cpg_shares and sparse_backward are part of this kernel.
template <typename Scalar>
__global__ void __launch_bounds__(kThreads, 2)
    dense_backward_quads(const __grid_constant__ LossArgs args,
                         const __grid_constant__ QuadMemory<typename AccOf<Scalar>::type> memory,
                         typename AccOf<Scalar>::type* partials) {
  using Entries = ResampledEntries<Scalar>;
  using Acc = typename Entries::Acc;
  const Stacks<false> tile(args);
  const Marks marks(args);
  const Entries entries(args);
  SparseGradient<Entries> sparse(args, memory.sparse);
  const TileCells<Entries> cells(args, tile, memory.staged.data());
  const int label = marks.id_of(*marks.patch(tile.n, tile.top, tile.left));
  const bool differs = differ(marks, tile, 0);
  const int C = static_cast<int>(args.C);
  for (int begin = 0, end = 0; begin < C; begin = end) {
    end = sparse.find_extras(marks, tile, entries, begin);
    if (begin == 0) {
      const Patch* patch = tile.has_patch() ? marks.patch(tile.n, tile.y(0), tile.x(0)) : nullptr;
      int labels[kStack] = {kIgnored, kIgnored, kIgnored, kIgnored};
      marks.load(tile, patch ? marks.id_of(*patch) : kIgnored, labels);
      PixelStats<Acc> stats[kStack];
      load_stats(args, tile, stats);
      const Pulls<Acc> pulls(args, tile, patch, labels, sparse, [&](int k) {
        return stats[k].loss(entries.at(tile.n, tile.y(k), tile.x(k), labels[k]));
      });
      tile.for_each([&](int k) {
        const int quad = cells.across.cell[tile.column(k)] - cells.across.first;
        memory.pixels.data()[memory.at(tile.column(k), quad) + tile.row(k)] = {
            stats[k].reference, scale_of(stats[k].rest), pulls.of_p[k], pulls.pull[k]};
        memory.labels.data()[tile.column(k) * memory.kPitch + tile.row(k)] = labels[k];
      });
    }
    const bool mixed = differs || sparse.any();
    for (int c = begin; c < end; c += memory.classes) {
      const int classes = end - c < memory.classes ? end - c : memory.classes;
      __syncthreads();  // the axes are filled in, and other cells are not needed any more
      const bool careful = any_of_block(!cells.load(args, tile, entries, c, classes));
      for (int i = threadIdx.x; i < classes * cells.across.quads; i += kThreads) {
        const int of_chunk = i % classes, j = i / classes;
        const int held = mixed ? sparse.rank(c + of_chunk) : -1;
        const Acc minus_label = c + of_chunk == label ? Acc(-1) : Acc(0);
        if (careful)
          QuadColumn<Entries, true, true>{memory, cells, sparse, c + of_chunk, held, minus_label}.run(of_chunk, j);
        else if (mixed)
          QuadColumn<Entries, false, true>{memory, cells, sparse, c + of_chunk, held, minus_label}.run(of_chunk, j);
        else
          QuadColumn<Entries, false, false>{memory, cells, sparse, c + of_chunk, held, minus_label}.run(of_chunk, j);
      }
      __syncthreads();  // all sums are there
      for (int i = threadIdx.x; i < classes * cells.count(); i += kThreads) {
        const int of_chunk = i / cells.count(), cell = i % cells.count();
        const int row = cell / cells.across.cells, column = cell % cells.across.cells;
        const Acc* sums = memory.sums.data() + 2 * i;
        const Acc right = column < cells.across.quads ? sums[0] : Acc(0), left = column > 0 ? sums[-1] : Acc(0);
        partials[((blockIdx.x * args.C + c + of_chunk) * memory.cells_down + row) * memory.cells_across + column] =
            left + right;
      }
    }
  }
}

}  // namespace bcmf::device
