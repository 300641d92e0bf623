// The CPG loss: the steps cpg_edges and cpg_residuals, which run within other kernels, and the kernel cpg_compare.
//
// A tile whose pixels all have one label is done after a look at its patches. In other tiles the edges (the pixels
// whose own windows hold several labels) and the pixels near them are listed, and worked on class by class. Labels, p
// and residuals of a window around the tile lie in shared memory. G and its estimate are multiplied by
// sobel_denominator, so that G is an integer and exact.
//
// Borders are replicated: beyond the image, the window around a tile holds copies of the border's pixels, and the
// gradient of such a copy goes to the pixel that it stands for.
#pragma once

#include "cuda/kernels/marks.cuh"
#include "cuda/kernels/stats.cuh"

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
  // Calls f(row, column) for all entries. All threads of the block call it together.
  template <typename F>
  __device__ __forceinline__ void for_each(F f) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    for (int row = warp; row < rows(); row += kWarps)
      for (int column = lane; column < columns(); column += kWarp) f(row - margin, column - margin);
  }
};

__device__ __forceinline__ uint16_t id_at(const Marks& marks, const Tile& tile, int row, int column) {
  static_assert(static_cast<uint16_t>(kIgnored) == kIgnoredId);
  return static_cast<uint16_t>(
      marks.class_of((tile.n * tile.H + clamp(tile.top + row, tile.H)) * tile.W + clamp(tile.left + column, tile.W)));
}

// The classes that may occur: a bit for each of the first 1024, and all others.
struct ClassSet {
  static constexpr int kWords = 32;
  unsigned* words;

  __device__ __forceinline__ void add(int c) const {
    if (c < 32 * kWords) atomicOr(&words[c / 32], 1u << c % 32);
  }
  __device__ __forceinline__ bool has(int c) const { return c >= 32 * kWords || words[c / 32] >> c % 32 & 1; }
  // Returns the first of them from class c on, or C if there is none.
  __device__ __forceinline__ int next(int c, int C) const {
    for (; c < C && c < 32 * kWords; c = (c / 32 + 1) * 32) {
      const unsigned bits = words[c / 32] >> c % 32;
      if (bits == 0) continue;
      c += __ffs(static_cast<int>(bits)) - 1;
      break;
    }
    return c < C ? c : C;
  }
};

// A bit for each pixel of `labels` (see Window), row by row, in words of 32 neighbours.
struct BitMap {
  static constexpr int kAcross = 3;  // words of a row
  static_assert(kColumns + 4 * kMaxRadius <= 32 * kAcross);
  unsigned* words;

  __device__ __forceinline__ bool has(int row, int column) const {
    return words[row * kAcross + column / 32] >> column % 32 & 1;
  }
  // The bits of a word, those of each pixel being the OR of its neighbours' in the rows `top`..`bottom`, from `left` to
  // `right` pixels beside it. Rows that are not there have none.
  __device__ __forceinline__ unsigned spread(int top, int bottom, int rows, int word, int left, int right) const {
    unsigned before = 0, here = 0, after = 0;
    for (int row = top < 0 ? 0 : top; row <= bottom && row < rows; ++row) {
      const unsigned* of_row = words + row * kAcross + word;
      before |= word > 0 ? of_row[-1] : 0;
      here |= of_row[0];
      after |= word + 1 < kAcross ? of_row[1] : 0;
    }
    unsigned found = 0;
    for (int i = left; i <= right; ++i)
      found |= i < 0 ? here << -i | before >> (32 + i) : i > 0 ? here >> i | after << (32 - i) : here;
    return found;
  }
};

// This is what a block keeps in shared memory of the tile and its surroundings. G is compared in the tile and in a
// margin around it, which is 0 in the forward, and in the backward the radius: the residuals that far outside reach
// pixels of the tile.
template <typename Acc>
struct Window {
  int radius;
  Area compared;      // where G is compared
  Area labels;        // all pixels in the windows of compared ones
  Acc* p;             // probabilities of a class, by entry of `labels`; only those near edges are filled in
  uint16_t* ids;      // classes or kIgnoredId, by entry of `labels`
  uint16_t* near;     // a list of the pixels within a radius of an edge: row << 8 | column in `labels`
  BitMap near_bits;   // the same pixels
  BitMap edges;       // that lie in `compared`
  BitMap scratch[3];  // pixels that differ from the one to their right, or below; ignored ones
  Acc* residuals;     // of a class, by entry of `compared`: first all for x, then all for y
  Acc* taps;          // for each offset the tap of K_x, then that of K_y
  ClassSet present;   // what the window holds
  int near_count;

  BCMF_HOST_DEVICE Window(const LossArgs& args, int margin, SharedCutter& shared)
      : radius(args.cpg_radius), compared{margin}, labels{margin + args.cpg_radius}, near_count(0) {
    const bool used = radius > 0;
    p = shared.take<Acc>(used ? labels.count() : 0);
    ids = shared.take<uint16_t>(used ? labels.count() : 0);
    near = shared.take<uint16_t>(used ? labels.count() : 0);
    for (BitMap* bits : {&near_bits, &edges, scratch, scratch + 1, scratch + 2})
      bits->words = shared.take<unsigned>(used ? words() : 0);
    residuals = shared.take<Acc>(used && margin > 0 ? 2 * compared.count() : 0);
    taps = shared.take<Acc>(used ? 2 * (2 * radius + 1) * (2 * radius + 1) : 0);
    present.words = shared.take<unsigned>(used ? ClassSet::kWords : 0);
  }

  // The step cpg_edges: loads labels, finds the edges, lists the pixels near them, and tells whether there are any. All
  // threads of the block call this function, load_class, compare and cpg_residuals together.
  __device__ __forceinline__ bool load(const LossArgs& args, const Marks& marks, const Tile& tile) {
    if (!differ(marks, tile, labels.margin)) return false;
    labels.for_each([&](int row, int column) { ids[labels.at(row, column)] = id_at(marks, tile, row, column); });
    const int size = 2 * radius + 1;
    for (int i = threadIdx.x; i < ClassSet::kWords; i += kThreads) present.words[i] = 0;
    for (int i = threadIdx.x; i < size * size; i += kThreads) {
      taps[2 * i] = static_cast<Acc>(sobel_tap(radius, i % size - radius, i / size - radius));
      taps[2 * i + 1] = static_cast<Acc>(sobel_tap(radius, i / size - radius, i % size - radius));
    }
    for (int i = threadIdx.x; compared.margin > 0 && i < 2 * compared.count(); i += kThreads) residuals[i] = 0;
    __syncthreads();
    find_changes();
    __syncthreads();
    const int word = static_cast<int>(threadIdx.x), row = word / BitMap::kAcross, across = word % BitMap::kAcross;
    if (word < words()) edges.words[word] = find_edges(args, tile, row, across);
    __syncthreads();
    unsigned bits = 0;
    if (word < words()) {
      bits = edges.spread(row - radius, row + radius, labels.rows(), across, -radius, radius);
      near_bits.words[word] = bits;
    }
    list_near(bits, row, across);
    return near_count > 0;
  }
  // Tells whether a pixel is within a radius of an edge.
  __device__ __forceinline__ bool is_near(int row, int column) const {
    return near_bits.has(row + labels.margin, column + labels.margin);
  }

  // Fills in p of a class at all pixels near edges.
  template <typename Entries>
  __device__ __forceinline__ void load_class(const LossArgs& args, const Tile& tile, const Entries& entries, int c) {
    __syncthreads();  // p of another class may still be read
    for_near([&](int row, int column) {
      const int y = clamp(tile.top + row, tile.H), x = clamp(tile.left + column, tile.W), at = labels.at(row, column);
      const int label = ids[at] == kIgnoredId ? kIgnored : ids[at];
      p[at] = stats_at(args, entries, tile.n, y, x, label).probability(entries.at(tile.n, y, x, c));
    });
    __syncthreads();
  }

  // Calls f(at, G_x, G_y, and the estimates of both) of class c for the edges, `at` being their entry of `compared`.
  template <typename F>
  __device__ __forceinline__ void compare(int c, F f) const {
    for_near([&](int row, int column) {
      if (!edges.has(row + labels.margin, column + labels.margin)) return;
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
  BCMF_HOST_DEVICE int words() const { return labels.rows() * BitMap::kAcross; }  // fewer than threads

  // Finds which pixels differ from their neighbours, which are ignored, and which classes there are.
  __device__ __forceinline__ void find_changes() const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    const int rows = labels.rows(), columns = labels.columns();
    for (int row = warp; row < rows; row += kWarps) {
      const uint16_t* of_row = ids + row * columns;
      for (int i = 0; i < BitMap::kAcross; ++i) {
        const int column = 32 * i + lane;
        const bool has = column < columns;
        const uint16_t id = has ? of_row[column] : kIgnoredId;
        const bool right = column + 1 < columns && of_row[column + 1] != id;
        const bool below = has && row + 1 < rows && of_row[columns + column] != id;
        if (id != kIgnoredId && (right || column + 1 == columns)) present.add(id);  // once for each run of pixels
        const unsigned found[] = {__ballot_sync(0xffffffffu, right), __ballot_sync(0xffffffffu, below),
                                  __ballot_sync(0xffffffffu, has && id == kIgnoredId)};
        for (int j = 0; lane == 0 && j < 3; ++j) scratch[j].words[row * BitMap::kAcross + i] = found[j];
      }
    }
  }
  // Returns a bit for each edge of a word: its window holds more than one label and, if cpg_window, no ignored one.
  __device__ __forceinline__ unsigned find_edges(const LossArgs& args, const Tile& tile, int row, int word) const {
    const int y = tile.top + row - labels.margin, rows = labels.rows();
    if (row < radius || row >= rows - radius || y < 0 || y >= tile.H) return 0;
    // A window is connected: if it holds several labels, two neighbours differ.
    unsigned found = scratch[0].spread(row - radius, row + radius, rows, word, -radius, radius - 1) |
                     scratch[1].spread(row - radius, row + radius - 1, rows, word, -radius, radius);
    found &= ~scratch[2].words[row * BitMap::kAcross + word];
    if (args.cpg_window) found &= ~scratch[2].spread(row - radius, row + radius, rows, word, -radius, radius);
    // Pixels begin..end-1 of the word lie in the image, and in `compared`.
    const int left = tile.left - labels.margin + 32 * word;
    const int begin = larger(-left, radius - 32 * word),
              end = -larger(left - tile.W, radius - labels.columns() + 32 * word);
    return found & bits_below(end) & ~bits_below(begin);
  }
  static __device__ __forceinline__ unsigned bits_below(int i) { return i >= 32 ? ~0u : i > 0 ? (1u << i) - 1 : 0u; }

  // Lists the pixels of all threads' words in their order, so that sums over the list have the same bits every time.
  __device__ __forceinline__ void list_near(unsigned bits, int row, int word) {
    int before = scan_block(__popc(bits), &near_count);
    for (; bits != 0; bits &= bits - 1)
      near[before++] = static_cast<uint16_t>(row << 8 | (32 * word + __ffs(static_cast<int>(bits)) - 1));
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
  const bool any = window.load(args, Marks(args), tile);
  const int C = any ? static_cast<int>(args.C) : 0;
  for (int c = any ? window.present.next(0, C) : C; c < C; c = window.present.next(c + 1, C)) {
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
