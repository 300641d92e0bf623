// The step sparse_backward: the gradient of the few pixels that are near CPG's edges, or that BCL selected by flipped
// labels.
#pragma once

#include "cuda/kernels/cpg.cuh"
#include "cuda/kernels/dense.cuh"

namespace bcmf::device {

// The shared memory of sparse_backward, and the list of pixels that it works on. The host makes one to see how many
// bytes it takes.
template <typename Acc, typename Sink>
struct SparseMemory {
  static constexpr int kPixels = kRows * kColumns;
  SharedCutter shared;
  Window<Acc> window;
  Acc* scratch;          // of the sink
  uint16_t* places;      // row * kColumns + column of each listed pixel
  Acc *factors, *pulls;  // of each listed pixel: its gradient is p (factor + b) - pull at the label - flipped pulls
  Acc* kept;             // b of the first classes that the tile holds, by class and listed pixel
  int count;             // how many pixels are listed
  int kept_count;        // for how many classes b is kept

  BCMF_HOST_DEVICE explicit SparseMemory(const LossArgs& args)
      : window(args, args.cpg_radius, shared),
        scratch(shared.take<Acc>(Sink::scratch())),
        places(shared.take<uint16_t>(kPixels)),
        factors(shared.take<Acc>(kPixels)),
        pulls(shared.take<Acc>(kPixels)),
        kept(shared.take<Acc>(kPixels)),
        count(0),
        kept_count(0) {}

  // Lists the pixels for which wanted(row, column) is true, in order. All threads of the block call it.
  template <typename F>
  __device__ __forceinline__ void list(const Tile& tile, F wanted) {
    constexpr int kOwn = kPixels / kThreads;
    const int first = static_cast<int>(threadIdx.x) * kOwn;
    unsigned bits = 0;
    for (int i = 0; i < kOwn; ++i) {
      const int row = (first + i) / kColumns, column = (first + i) % kColumns;
      if (row < tile.rows && column < tile.columns && wanted(row, column)) bits |= 1u << i;
    }
    int before = scan_block(__popc(bits), &count);
    for (int i = 0; i < kOwn; ++i)
      if (bits >> i & 1) places[before++] = static_cast<uint16_t>(first + i);
    kept_count = count > 0 ? kPixels / count : 0;
    __syncthreads();  // the list may be read at once
  }
  // Calls f(i, row, column) for the listed pixels. A pixel is always visited by the same thread.
  template <typename F>
  __device__ __forceinline__ void for_each(F f) const {
    for (int i = threadIdx.x; i < count; i += kThreads) f(i, places[i] / kColumns, places[i] % kColumns);
  }
};

// Writes the gradient of the few pixels that are near CPG's edges or that BCL selected by flipped labels. A sink that
// adds is given the part that dense_backward leaves out; any other one is given the whole gradient of these pixels,
// which replaces that of dense_backward. The steps cpg_edges, cpg_residuals and cpg_shares are part of this kernel.
template <typename Entries, typename Sink>
__global__ void __launch_bounds__(kThreads, 3) sparse_backward(const __grid_constant__ LossArgs args, Sink sink) {
  using Acc = typename Entries::Acc;
  const Tile tile(args);
  const Entries entries(args);
  SparseMemory<Acc, Sink> memory(args);
  Window<Acc>& window = memory.window;
  const auto selected_at = [&](int row, int column) -> unsigned {
    const int64_t pixel = (tile.n * tile.H + tile.top + row) * tile.W + tile.left + column;
    return args.bcl_flipped ? steps_of(args, pixel) : 0;
  };
  const auto p_of = [&](int row, int column, int c) {
    const int y = tile.top + row, x = tile.left + column;
    const Acc* m = static_cast<const Acc*>(args.stats) + (tile.n * tile.H + y) * tile.W + x;
    return exp_of((entries.at(tile.n, y, x, c) - m[0]) - m[args.N * args.H * args.W]);
  };
  const bool edges = args.cpg_radius > 0 && window.load(args, tile);
  if (!edges && !args.bcl_flipped) return;
  memory.list(tile, [&](int row, int column) {
    return (edges && window.is_near(row, column)) || selected_at(row, column) != 0;
  });
  if (memory.count == 0) return;
  sink.begin(args, tile, memory.scratch);
  sink.clear();
  memory.for_each([&](int i, int row, int column) {
    const int y = tile.top + row, x = tile.left + column;
    const int64_t pixel = (tile.n * tile.H + y) * tile.W + x;
    const Acc* m = static_cast<const Acc*>(args.stats) + pixel;
    const auto loss = [&](int c) { return (m[0] - entries.at(tile.n, y, x, c)) + m[args.N * args.H * args.W]; };
    memory.pulls[i] =
        Sink::kAdds ? Acc(0) : pull_of<Acc>(args, pixel, read_label(args, tile.n, y, x), ce_scale<Acc>(args), loss);
    memory.factors[i] = memory.pulls[i] + flipped_pull<Acc>(args, selected_at(row, column));
  });
  const int C = static_cast<int>(args.C);
  int held = 0;  // how many of the classes before c the tile holds
  for (int c = 0; c < C && edges; ++c) {
    if (!window.holds(c)) continue;
    window.cpg_residuals(args, tile, entries, c);
    memory.for_each([&](int i, int row, int column) {
      const Acc b = window.b_at(tile, row, column);
      if (held < memory.kept_count) memory.kept[held * memory.count + i] = b;
      // The factor loses the pixel's share. Where b is 0 nothing is compared, and p may be NaN.
      if (b != 0) memory.factors[i] -= p_of(row, column, c) * b;
    });
    ++held;
  }
  const auto value_of = [&](int i, int y, int x, int label, unsigned selected, int c, Acc p, Acc b) {
    const Acc factor = memory.factors[i];
    Acc value = factor != 0 ? factor * p : Acc(0);
    if (c == label) value -= memory.pulls[i];
    if (selected != 0) value -= flipped_pull_of<Acc>(args, selected, tile, y, x, c);
    return b != 0 ? value + p * b : value;
  };
  if (!Sink::kAdds && held <= memory.kept_count) {
    // All b are kept: no residual is needed again, and threads go from pixel to pixel without a barrier.
    constexpr int kAtOnce = 4;
    memory.for_each([&](int i, int row, int column) {
      const int y = tile.top + row, x = tile.left + column, label = read_label(args, tile.n, y, x);
      const unsigned selected = selected_at(row, column);
      const Acc* m = static_cast<const Acc*>(args.stats) + (tile.n * tile.H + y) * tile.W + x;
      const Acc max_logit = m[0], log_sum = m[args.N * args.H * args.W];
      int before = 0;  // how many of the classes before c the tile holds
      for (int first = 0; first < C; first += kAtOnce) {
        Acc z[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) z[j] = entries.at(tile.n, y, x, first + j < C ? first + j : C - 1);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const int c = first + j;
          if (c >= C) break;
          const bool holds = edges && window.holds(c);
          const Acc b = holds ? memory.kept[before * memory.count + i] : Acc(0);
          const Acc p = exp_of((z[j] - max_logit) - log_sum);
          sink.set(tile, row, column, c, value_of(i, y, x, label, selected, c, p, b));
          before += holds;
        }
      }
    });
    return;
  }
  held = 0;
  for (int c = 0; c < C; ++c) {
    const bool holds = edges && window.holds(c), kept = held < memory.kept_count;
    if (holds && !kept) window.cpg_residuals(args, tile, entries, c);
    memory.for_each([&](int i, int row, int column) {
      const int y = tile.top + row, x = tile.left + column;
      Acc b = 0;
      if (holds) b = kept ? memory.kept[held * memory.count + i] : window.b_at(tile, row, column);
      const int label = Sink::kAdds ? kIgnored : read_label(args, tile.n, y, x);  // its pulls are in dense_backward
      sink.set(tile, row, column, c, value_of(i, y, x, label, selected_at(row, column), c, p_of(row, column, c), b));
    });
    sink.add(args, tile, c);
    held += holds;
  }
}

}  // namespace bcmf::device
