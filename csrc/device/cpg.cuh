// CPG: tiles whose labels differ are worked on class by class, with the labels and p of a window around the tile in
// shared memory; all other tiles are done after a look at their labels. G and its estimate are kept times
// sobel_denominator; G is exact then.
//
// Windows replicate the border: the window around a tile holds, beyond the image, copies of the border's pixels, and
// the gradient of such a copy goes to the pixel that it stands for.
#pragma once

#include "logits.cuh"

namespace bcmf::device {

constexpr int kMaxRadius = 3;

// A rectangle around the tile, `margin` wider on each side, in shared memory with a pitch of its own.
struct Area {
  int margin, pitch;
  __device__ __forceinline__ int rows() const { return kRows + 2 * margin; }
  __device__ __forceinline__ int columns() const { return kColumns + 2 * margin; }
  __device__ __forceinline__ int count() const { return rows() * columns(); }
  __device__ __forceinline__ int at(int row, int column) const {  // from the tile's corner
    return (row + margin) * pitch + column + margin;
  }
};

// kMargin: how far around the tile G is compared: 0 in the forward, the radius (at most kMaxRadius) in the backward.
template <typename Acc, int kMargin>
struct Window {
  static constexpr int kLabelPitch = kColumns + 2 * (kMargin + kMaxRadius);
  static constexpr int kPitch = kColumns + 2 * kMargin;
  static constexpr int kLabels = (kRows + 2 * (kMargin + kMaxRadius)) * kLabelPitch;
  static constexpr int kResiduals = (kRows + 2 * kMargin) * kPitch;
  static constexpr int kPresent = 32;  // words: a bit for each of the first 1024 classes

  Acc* p;         // kLabels at least
  uint16_t* ids;  // (kLabels,)
  uint8_t* usable;
  Acc *residual_x, *residual_y;  // (kResiduals,), with a margin
  unsigned* present;
  int16_t* taps;  // of G_x, by row and column offset; those of G_y are mirrored
  int radius;
  Area labels, compared;

  // p: kLabels entries of the block's shared memory.
  __device__ __forceinline__ Window(const LossArgs& args, Acc* p) : p(p), radius(args.cpg_radius) {
    BCMF_SHARED(uint16_t, shared_ids, kLabels);
    BCMF_SHARED(uint8_t, shared_usable, kResiduals);
    BCMF_SHARED(Acc, residuals, kMargin > 0 ? 2 * kResiduals : 1);
    BCMF_SHARED(unsigned, shared_present, kPresent + 1);
    BCMF_SHARED(int16_t, shared_taps, (2 * kMaxRadius + 1) * (2 * kMaxRadius + 1));
    ids = shared_ids, usable = shared_usable, present = shared_present, taps = shared_taps;
    residual_x = residuals, residual_y = residuals + (kMargin > 0 ? kResiduals : 0);
    const int margin = kMargin > 0 ? radius : 0;
    labels = {margin + radius, kLabelPitch};
    compared = {margin, kPitch};
    const int size = 2 * radius + 1;
    for (int i = threadIdx.x; i < size * size; i += kThreads)
      taps[i] = static_cast<int16_t>(sobel_tap(radius, i % size - radius, i / size - radius));
  }

  // Loads the labels; whether the tile's windows hold more than one.
  __device__ __forceinline__ bool load(const LossArgs& args, const Tile& tile) {
    unsigned& differs = present[kPresent];
    for (int i = threadIdx.x; i <= kPresent; i += kThreads) present[i] = 0;
    __syncthreads();
    const uint16_t first = id_at(args, tile.n, tile.top, tile.left);
    uint16_t last = kIgnoredId;
    bool other = false;
    for_area(labels, [&](int row, int column, int at) {
      const int64_t y = clamp(tile.top + row, args.H), x = clamp(tile.left + column, args.W);
      const uint16_t id = ids[at] = id_at(args, tile.n, y, x);
      other = other || id != first;
      if (id != last && id < 32 * kPresent) atomicOr(&present[id / 32], 1u << id % 32);
      last = id;
    });
    if (other) atomicOr(&differs, 1u);
    __syncthreads();
    if (differs == 0) return false;
    for_area(compared, [&](int row, int column, int at) {
      const int64_t y = tile.top + row, x = tile.left + column;
      bool ignored = y < 0 || y >= args.H || x < 0 || x >= args.W;
      for (int u = -radius; u <= radius; ++u)
        for (int v = -radius; v <= radius; ++v)
          if (args.cpg_window || (u == 0 && v == 0))
            ignored = ignored || ids[labels.at(row + u, column + v)] == kIgnoredId;
      usable[at] = !ignored;
    });
    return true;  // the next barrier is at the start of load_class
  }
  __device__ __forceinline__ bool holds(int64_t c) const { return c >= 32 * kPresent || present[c / 32] >> c % 32 & 1; }

  // p of a class, all around the tile.
  template <typename Source>
  __device__ __forceinline__ void load_class(const LossArgs& args, const Tile& tile, const Source& source, int64_t c) {
    const Acc* max_logit = static_cast<const Acc*>(args.stats);
    const Acc* log_sum = max_logit + args.N * args.H * args.W;
    __syncthreads();
    for_area(labels, [&](int row, int column, int at) {
      const int64_t y = clamp(tile.top + row, args.H), x = clamp(tile.left + column, args.W);
      const int64_t pixel = (tile.n * args.H + y) * args.W + x;
      p[at] = exp((source.at(tile.n, y, x, c) - max_logit[pixel]) - log_sum[pixel]);
    });
    __syncthreads();
  }

  // f(at, G_x, G_y, estimates of both) for the pixels at which class c is compared.
  template <typename F>
  __device__ __forceinline__ void compare(int64_t c, F f) const {
    for_area(compared, [&](int row, int column, int at) {
      if (!usable[at]) return f(at, 0, 0, Acc(0), Acc(0));
      int gx = 0, gy = 0;
      Acc px = 0, py = 0;
      for (int u = -radius; u <= radius; ++u)
        for (int v = -radius; v <= radius; ++v) {
          const int tap_x = tap(u, v), tap_y = tap(v, u), from = labels.at(row + u, column + v);
          const bool is_class = ids[from] == c;
          gx += is_class ? tap_x : 0;
          gy += is_class ? tap_y : 0;
          px += static_cast<Acc>(tap_x) * p[from];
          py += static_cast<Acc>(tap_y) * p[from];
        }
      f(at, gx, gy, px, py);
    });
  }

  // Finds the residuals of class c, the derivatives of the total by the estimates, and waits for them.
  template <typename Source>
  __device__ __forceinline__ void find_residuals(const LossArgs& args, const Tile& tile, const Source& source,
                                                 int64_t c) {
    load_class(args, tile, source, c);
    const Acc count = static_cast<const Acc*>(args.summary)[kEdges];
    const Acc unit = static_cast<Acc>(sobel_denominator(radius));
    const Acc upstream = *static_cast<const Acc*>(args.grad_total);
    const Acc scale = count != 0 ? 2 * static_cast<Acc>(args.cpg_weight) * upstream / count / (unit * unit) : Acc(0);
    compare(c, [&](int at, int gx, int gy, Acc px, Acc py) {
      residual_x[at] = gx != 0 ? scale * (px - static_cast<Acc>(gx)) : Acc(0);
      residual_y[at] = gy != 0 ? scale * (py - static_cast<Acc>(gy)) : Acc(0);
    });
    __syncthreads();
  }

  // Derivative of the total by p of the class at a pixel of the thread's stack.
  __device__ __forceinline__ Acc gradient(const LossArgs& args, const Tile& tile, int k) const {
    const int row = tile.row + k, column = tile.column;
    const int64_t y = tile.y(k), x = tile.x();
    // The pixel and its copies beyond the border.
    const int top = y == 0 ? row - radius : row, bottom = y == args.H - 1 ? row + radius : row;
    const int left = x == 0 ? column - radius : column, right = x == args.W - 1 ? column + radius : column;
    Acc sum = 0;
    for (int i = top; i <= bottom; ++i)
      for (int j = left; j <= right; ++j)
        for (int u = -radius; u <= radius; ++u)
          for (int v = -radius; v <= radius; ++v) {
            const int from_row = i - u, from_column = j - v;  // G there has this pixel at (u, v)
            if (from_row < -radius || from_row >= kRows + radius) continue;
            if (from_column < -radius || from_column >= kColumns + radius) continue;
            const int from = compared.at(from_row, from_column);
            sum += static_cast<Acc>(tap(u, v)) * residual_x[from] + static_cast<Acc>(tap(v, u)) * residual_y[from];
          }
    return sum;
  }

 private:
  static __device__ __forceinline__ uint16_t id_at(const LossArgs& args, int64_t n, int64_t y, int64_t x) {
    static_assert(static_cast<uint16_t>(kIgnored) == kIgnoredId);
    return static_cast<uint16_t>(class_at(args, n, y, x));
  }

  __device__ __forceinline__ int tap(int u, int v) const { return taps[(u + radius) * (2 * radius + 1) + v + radius]; }

  // f(row, column, at) for all places of an area, by all threads of the block.
  template <typename F>
  static __device__ __forceinline__ void for_area(const Area& area, F f) {
    const int columns = area.columns(), count = area.count();
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const int row = i / columns - area.margin, column = i % columns - area.margin;
      f(row, column, area.at(row, column));
    }
  }
};

// Partial sums of (G - its estimate)^2 and of |M|: (2, tiles).
template <typename Source>
__global__ void __launch_bounds__(kThreads) cpg_tiles(const __grid_constant__ LossArgs args, double* partials) {
  using Acc = typename Source::Acc;
  using TileWindow = Window<Acc, 0>;
  BCMF_SHARED(Acc, p, TileWindow::kLabels);
  const Tile tile(args);
  const Source source(args, tile);
  TileWindow window(args, p);
  double sums[2] = {};
  if (window.load(args, tile)) {
    const Acc unit = Acc(1) / static_cast<Acc>(sobel_denominator(args.cpg_radius));
    for (int64_t c = 0; c < args.C; ++c) {
      if (!window.holds(c)) continue;
      window.load_class(args, tile, source, c);
      window.compare(c, [&](int, int gx, int gy, Acc px, Acc py) {
        const Acc dx = gx != 0 ? unit * (static_cast<Acc>(gx) - px) : Acc(0);
        const Acc dy = gy != 0 ? unit * (static_cast<Acc>(gy) - py) : Acc(0);
        sums[0] += dx * dx + dy * dy;
        sums[1] += (gx != 0) + (gy != 0);
      });
    }
  }
  store_partials(sums, partials);
}

}  // namespace bcmf::device
