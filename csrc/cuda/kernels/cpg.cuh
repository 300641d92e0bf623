// The CPG loss: the steps cpg_edges and cpg_residuals, which run within other kernels, and the kernel cpg_compare.
//
// A tile whose pixels all have one label is done after a look at its labels. In other tiles the edges (the pixels whose
// own windows hold several labels) and the pixels near them are listed, and worked on class by class. Labels, p and
// residuals of a window around the tile lie in shared memory. G and its estimate are multiplied by sobel_denominator,
// so that G is an integer and exact.
//
// Borders are replicated: beyond the image, the window around a tile holds copies of the border's pixels, and the
// gradient of such a copy goes to the pixel that it stands for.
#pragma once

#include "cuda/kernels/logits.cuh"

namespace bcmf::device {

// The tile with a margin on each side. Entries are numbered row by row; row 0 and column 0 are those of the tile.
struct Area {
  int margin;
  BCMF_HOST_DEVICE int rows() const { return kRows + 2 * margin; }
  BCMF_HOST_DEVICE int columns() const { return kColumns + 2 * margin; }
  BCMF_HOST_DEVICE int count() const { return rows() * columns(); }
  BCMF_HOST_DEVICE int at(int row, int column) const { return (row + margin) * columns() + column + margin; }
  BCMF_HOST_DEVICE bool has(int row, int column) const {
    return row >= -margin && row < kRows + margin && column >= -margin && column < kColumns + margin;
  }
  // Calls f(row, column) for entry i.
  template <typename F>
  __device__ __forceinline__ void visit(int i, F f) const {
    f(i / columns() - margin, i % columns() - margin);
  }
  // Calls f(row, column) for all entries. All threads of the block call it together.
  template <typename F>
  __device__ __forceinline__ void for_each(F f) const {
    for (int i = threadIdx.x; i < count(); i += kThreads) visit(i, f);
  }
};

__device__ __forceinline__ uint16_t id_at(const LossArgs& args, const Tile& tile, int row, int column) {
  static_assert(static_cast<uint16_t>(kIgnored) == kIgnoredId);
  return static_cast<uint16_t>(
      class_at(args, tile.n, clamp(tile.top + row, tile.H), clamp(tile.left + column, tile.W)));
}

// This is what a block keeps in shared memory of the tile and its surroundings. G is compared in the tile and in a
// margin around it, which is 0 in the forward, and in the backward the radius: the residuals that far outside reach
// pixels of the tile.
template <typename Acc>
struct Window {
  static constexpr int kPresent = 32;  // words with a bit for each of the first 1024 classes

  int radius;
  Area compared;        // where G is compared
  Area labels;          // all pixels in the windows of compared ones
  Acc* p;               // probabilities of a class, by entry of `labels`; only those near edges are filled in
  uint16_t* ids;        // classes or kIgnoredId, by entry of `labels`
  uint16_t* near;       // a list of the pixels within a radius of an edge: row << 8 | column in `labels`
  unsigned* near_bits;  // the same pixels as a bit for each entry of `labels`
  uint8_t* edges;       // by entry of `compared`
  Acc* residuals;       // of a class, by entry of `compared`: first all for x, then all for y
  Acc* taps;            // for each offset the tap of K_x, then that of K_y
  unsigned* present;    // the classes that the window holds, a bit each
  int near_count;

  BCMF_HOST_DEVICE Window(const LossArgs& args, int margin, SharedCutter& shared)
      : radius(args.cpg_radius), compared{margin}, labels{margin + args.cpg_radius}, near_count(0) {
    const bool used = radius > 0;
    p = shared.take<Acc>(used ? labels.count() : 0);
    ids = shared.take<uint16_t>(used ? labels.count() : 0);
    near = shared.take<uint16_t>(used ? labels.count() : 0);
    near_bits = shared.take<unsigned>(used ? words() : 0);
    edges = shared.take<uint8_t>(used ? compared.count() : 0);
    residuals = shared.take<Acc>(used && margin > 0 ? 2 * compared.count() : 0);
    taps = shared.take<Acc>(used ? 2 * (2 * radius + 1) * (2 * radius + 1) : 0);
    present = shared.take<unsigned>(used ? kPresent : 0);
  }

  // The step cpg_edges: loads labels, finds the edges, lists the pixels near them, and tells whether there are any. All
  // threads of the block call this function, load_class, compare and cpg_residuals together.
  __device__ __forceinline__ bool load(const LossArgs& args, const Tile& tile) {
    const uint16_t first = id_at(args, tile, 0, 0);
    bool other = false;
    labels.for_each([&](int row, int column) {
      const uint16_t id = ids[labels.at(row, column)] = id_at(args, tile, row, column);
      other = other || id != first;
    });
    if (!any_of_block(other)) return false;
    const int size = 2 * radius + 1;
    for (int i = threadIdx.x; i < kPresent; i += kThreads) present[i] = 0;
    for (int i = threadIdx.x; i < words(); i += kThreads) near_bits[i] = 0;
    for (int i = threadIdx.x; i < size * size; i += kThreads) {
      taps[2 * i] = static_cast<Acc>(sobel_tap(radius, i % size - radius, i / size - radius));
      taps[2 * i + 1] = static_cast<Acc>(sobel_tap(radius, i / size - radius, i % size - radius));
    }
    for (int i = threadIdx.x; compared.margin > 0 && i < 2 * compared.count(); i += kThreads) residuals[i] = 0;
    __syncthreads();
    uint16_t last = kIgnoredId;
    labels.for_each([&](int row, int column) {
      const uint16_t id = ids[labels.at(row, column)];
      if (id != last && id < 32 * kPresent) atomicOr(&present[id / 32], 1u << id % 32);
      last = id;
    });
    compared.for_each([&](int row, int column) {
      const bool edge = is_edge(args, tile, row, column);
      edges[compared.at(row, column)] = edge;
      for (int u = -radius; edge && u <= radius; ++u)
        for (int v = -radius; v <= radius; ++v) {
          const int at = labels.at(row + u, column + v);
          atomicOr(&near_bits[at / 32], 1u << at % 32);
        }
    });
    __syncthreads();
    list_near();
    return near_count > 0;
  }
  __device__ __forceinline__ bool holds(int c) const { return c >= 32 * kPresent || present[c / 32] >> c % 32 & 1; }

  // Tells whether a pixel is within a radius of an edge.
  __device__ __forceinline__ bool is_near(int row, int column) const {
    const int at = labels.at(row, column);
    return near_bits[at / 32] >> at % 32 & 1;
  }

  // Fills in p of a class at all pixels near edges.
  template <typename Entries>
  __device__ __forceinline__ void load_class(const LossArgs& args, const Tile& tile, const Entries& entries, int c) {
    const Acc* max_logit = static_cast<const Acc*>(args.stats);
    const Acc* log_sum = max_logit + args.N * args.H * args.W;
    __syncthreads();  // p of another class may still be read
    for_near([&](int row, int column) {
      const int y = clamp(tile.top + row, tile.H), x = clamp(tile.left + column, tile.W);
      const int64_t pixel = (tile.n * tile.H + y) * tile.W + x;
      p[labels.at(row, column)] = exp_of((entries.at(tile.n, y, x, c) - max_logit[pixel]) - log_sum[pixel]);
    });
    __syncthreads();
  }

  // Calls f(at, G_x, G_y, and the estimates of both) of class c for the edges, `at` being their entry of `compared`.
  template <typename F>
  __device__ __forceinline__ void compare(int c, F f) const {
    for_near([&](int row, int column) {
      if (!compared.has(row, column) || !edges[compared.at(row, column)]) return;
      Acc gx = 0, gy = 0, px = 0, py = 0;
      const Acc* tap = taps;
      for (int u = -radius; u <= radius; ++u)
        for (int v = -radius; v <= radius; ++v, tap += 2) {
          const int from = labels.at(row + u, column + v);
          const Acc is_class = ids[from] == c ? Acc(1) : Acc(0);
          gx += tap[0] * is_class;
          gy += tap[1] * is_class;
          px += tap[0] * p[from];
          py += tap[1] * p[from];
        }
      f(compared.at(row, column), gx, gy, px, py);
    });
  }

  // The step cpg_residuals: finds the derivatives of the total by the estimates of class c, and waits for them.
  template <typename Entries>
  __device__ __forceinline__ void cpg_residuals(const LossArgs& args, const Tile& tile, const Entries& entries, int c) {
    load_class(args, tile, entries, c);
    const Acc count = static_cast<const Acc*>(args.summary)[kEdges];
    const Acc unit = static_cast<Acc>(sobel_denominator(radius));
    const Acc upstream = *static_cast<const Acc*>(args.grad_total);
    const Acc scale = count != 0 ? 2 * static_cast<Acc>(args.cpg_weight) * upstream / count / (unit * unit) : Acc(0);
    compare(c, [&](int at, Acc gx, Acc gy, Acc px, Acc py) {
      residuals[at] = gx != 0 ? scale * (px - gx) : Acc(0);
      residuals[compared.count() + at] = gy != 0 ? scale * (py - gy) : Acc(0);
    });
    __syncthreads();
  }

  // Returns b, the derivative of the total by p of the class, at a pixel of the tile.
  __device__ __forceinline__ Acc b_at(const Tile& tile, int row, int column) const {
    const int y = tile.top + row, x = tile.left + column, size = 2 * radius + 1;
    // These are the rows and columns of the pixel and of its copies beyond the border.
    const int top = y == 0 ? row - radius : row, bottom = y == tile.H - 1 ? row + radius : row;
    const int left = x == 0 ? column - radius : column, right = x == tile.W - 1 ? column + radius : column;
    Acc sum = 0;
    for (int i = top; i <= bottom; ++i)
      for (int j = left; j <= right; ++j)
        for (int u = -radius; u <= radius; ++u)
          for (int v = -radius; v <= radius; ++v) {
            if (!compared.has(i - u, j - v)) continue;
            const int from = compared.at(i - u, j - v);  // G there has this pixel at (u, v)
            const Acc* tap = taps + 2 * ((u + radius) * size + v + radius);
            sum += tap[0] * residuals[from] + tap[1] * residuals[compared.count() + from];
          }
    return sum;
  }

 private:
  // Tells whether a pixel is an edge: its window holds more than one label and, if cpg_window, no ignored one.
  __device__ __forceinline__ bool is_edge(const LossArgs& args, const Tile& tile, int row, int column) const {
    const int y = tile.top + row, x = tile.left + column;
    const uint16_t own = ids[labels.at(row, column)];
    if (y < 0 || y >= tile.H || x < 0 || x >= tile.W || own == kIgnoredId) return false;
    bool differ = false, ignored = false;
    for (int u = -radius; u <= radius; ++u)
      for (int v = -radius; v <= radius; ++v) {
        const uint16_t id = ids[labels.at(row + u, column + v)];
        differ = differ || id != own;
        ignored = ignored || id == kIgnoredId;
      }
    return differ && !(ignored && args.cpg_window);
  }

  BCMF_HOST_DEVICE int words() const { return (labels.count() + 31) / 32; }

  // Lists near_bits in their order, so that sums over the list have the same bits every time. There are fewer words
  // than threads.
  __device__ __forceinline__ void list_near() {
    const int word = static_cast<int>(threadIdx.x);
    unsigned bits = word < words() ? near_bits[word] : 0;
    int before = scan_block(__popc(bits), &near_count);
    for (; bits != 0; bits &= bits - 1) {
      labels.visit(32 * word + __ffs(static_cast<int>(bits)) - 1, [&](int row, int column) {
        near[before++] = static_cast<uint16_t>((row + labels.margin) << 8 | (column + labels.margin));
      });
    }
    __syncthreads();  // the list may be read at once
  }
  // Calls f(row, column) for the pixels near edges.
  template <typename F>
  __device__ __forceinline__ void for_near(F f) const {
    for (int i = threadIdx.x; i < near_count; i += kThreads)
      f((near[i] >> 8) - labels.margin, (near[i] & 255) - labels.margin);
  }
};

// Writes partial sums (2, tiles): of (G - its estimate)^2, and of |M|.
template <typename Entries>
__global__ void __launch_bounds__(kThreads) cpg_compare(const __grid_constant__ LossArgs args, double* partials) {
  using Acc = typename Entries::Acc;
  const Tile tile(args);
  SharedCutter shared;
  Window<Acc> window(args, 0, shared);
  const Entries entries(args);
  const Acc unit = Acc(1) / static_cast<Acc>(sobel_denominator(args.cpg_radius));
  double sums[2] = {};
  const bool any = window.load(args, tile);
  for (int c = 0; c < args.C && any; ++c) {
    if (!window.holds(c)) continue;
    window.load_class(args, tile, entries, c);
    window.compare(c, [&](int, Acc gx, Acc gy, Acc px, Acc py) {
      const Acc dx = gx != 0 ? unit * (gx - px) : Acc(0), dy = gy != 0 ? unit * (gy - py) : Acc(0);
      sums[0] += dx * dx + dy * dy;
      sums[1] += (gx != 0) + (gy != 0);
    });
  }
  store_partials(sums, partials);
}

}  // namespace bcmf::device
