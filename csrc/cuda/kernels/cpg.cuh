// The CPG loss: the steps cpg_edges and cpg_residuals, which run within other kernels, and the kernel cpg_compare.
//
// A tile whose pixels all have one label is done after a look at its patches. In other tiles the edges (the pixels
// whose own windows hold several labels) are found by bit maps, in the forward only, which leaves them to the backward.
// The edges and the pixels near them are listed, and worked on class by class. Their labels, p and residuals lie in
// shared memory. G and its estimate are multiplied by sobel_denominator, so that G is an integer and exact.
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
  int pitch;  // from a row to the next. Listed pixels are short runs below each other, which lie in other banks.

  explicit Area(int margin) : margin(margin), pitch((columns() + 2) / 8 * 8 + 5) {}
  BCMF_HOST_DEVICE int rows() const { return kRows + 2 * margin; }
  BCMF_HOST_DEVICE int columns() const { return kColumns + 2 * margin; }
  BCMF_HOST_DEVICE int count() const { return rows() * pitch; }
  BCMF_HOST_DEVICE int at(int row, int column) const { return (row + margin) * pitch + column + margin; }
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

// Calls f(u, v, tap of K_x, tap of K_y) for the offsets of a window that have taps. Without kUnrolled the taps are not
// constants, and it takes fewer registers.
template <int kRadius, bool kUnrolled, typename F>
__device__ __forceinline__ void for_taps(F f) {
  constexpr int kAtOnce = kUnrolled ? 2 * kRadius + 1 : 1;  // rows
#pragma unroll kAtOnce
  for (int u = -kRadius; u <= kRadius; ++u)
#pragma unroll
    for (int v = -kRadius; v <= kRadius; ++v)
      if (u != 0 || v != 0) f(u, v, sobel_tap(kRadius, v, u), sobel_tap(kRadius, u, v));
}

// The shared memory of a Window.
template <typename Acc>
struct WindowMemory {
  static constexpr bool kKeepsStats = sizeof(Acc) == 4;  // there is no room for those of fp64, which is for checks
  Area labels, compared;                                 // see Window
  SharedArray<Acc> p, residuals;
  SharedArray<PixelStats<Acc>> stats;
  SharedArray<uint16_t> ids, near, edges;
  SharedArray<unsigned> near_bits, edge_bits, scratch, present;

  WindowMemory(const LossArgs& args, int margin, SharedCutter& shared)
      : labels(margin + args.cpg_radius), compared(margin) {
    const bool used = args.cpg_radius > 0;
    const int entries = used ? labels.count() : 0, words = used ? labels.rows() * BitMap::kAcross : 0;
    p = shared.take<Acc>(entries);
    stats = shared.take<PixelStats<Acc>>(kKeepsStats ? entries : 0);
    ids = shared.take<uint16_t>(entries);
    near = shared.take<uint16_t>(entries);
    edges = shared.take<uint16_t>(used ? compared.count() : 0);
    near_bits = shared.take<unsigned>(words);
    edge_bits = shared.take<unsigned>(words);
    scratch = shared.take<unsigned>(margin == 0 ? 3 * words : 0);
    residuals = shared.take<Acc>(used && margin > 0 ? 2 * compared.count() : 0);
    present = shared.take<unsigned>(used ? ClassSet::kWords : 0);
  }
};

// What a block keeps in shared memory of the tile and its surroundings. G is compared in the tile and in a margin
// around it, which is 0 in the forward, and in the backward the radius: the residuals that far outside reach pixels of
// the tile. All threads of the block call its functions together, but for near_bits and b_at.
template <typename Acc>
class Window {
 public:
  const Area& labels;  // all pixels in the windows of compared ones
  const Acc* p;        // probabilities of a class, by entry of `labels`; only those near edges are filled in
  ClassSet present;    // the classes near edges

  __device__ __forceinline__ Window(const LossArgs& args, const WindowMemory<Acc>& memory)
      : labels(memory.labels),
        p(memory.p.data()),
        present{memory.present.data()},
        radius_(args.cpg_radius),
        compared_(memory.compared),
        memory_(memory),
        near_bits_{memory.near_bits.data()},
        edge_bits_{memory.edge_bits.data()} {}

  // The step cpg_edges: finds the edges of the tile, and leaves them in the marks. Returns whether there are any.
  template <typename Entries>
  __device__ __forceinline__ bool find(const LossArgs& args, const Marks& marks, const Tile& tile,
                                       const Entries& entries) {
    if (!differ(marks, tile, labels.margin)) {
      store_edges(marks, tile, false);
      return false;
    }
    uint16_t* ids = memory_.ids.data();
    labels.for_each([&](int row, int column) { ids[labels.at(row, column)] = id_at(marks, tile, row, column); });
    __syncthreads();  // the labels are there
    find_changes(ids);
    __syncthreads();  // the changes are there
    const int word = static_cast<int>(threadIdx.x);
    if (word < words()) edge_bits_.words[word] = find_edges(args, tile, word / BitMap::kAcross, word % BitMap::kAcross);
    list(args, marks, tile, entries);
    store_edges(marks, tile, true);
    return near_count_ > 0;
  }
  // The same in the backward, whose window is wider: reads the edges from the marks.
  template <typename Entries>
  __device__ __forceinline__ bool recall(const LossArgs& args, const Marks& marks, const Tile& tile,
                                         const Entries& entries) {
    if (!differ(marks, tile, labels.margin)) return false;
    const int word = static_cast<int>(threadIdx.x);
    if (word < words())
      edge_bits_.words[word] = recall_edges(marks, tile, word / BitMap::kAcross, word % BitMap::kAcross);
    Acc* residuals = memory_.residuals.data();
    for (int i = threadIdx.x; i < 2 * compared_.count(); i += kThreads) residuals[i] = 0;
    list(args, marks, tile, entries);
    return near_count_ > 0;
  }

  // The bits of 4 neighbours in the tile, from (row, column) on, that are within a radius of an edge.
  __device__ __forceinline__ unsigned near_bits(int row, int column) const {
    const int place = column + labels.margin;
    const unsigned* words = near_bits_.words + (row + labels.margin) * BitMap::kAcross + place / 32;
    return __funnelshift_r(words[0], words[1], place % 32) & 0xf;
  }

  // Fills in p of a class at all pixels near edges.
  template <typename Entries>
  __device__ __forceinline__ void load_class(const LossArgs& args, const Tile& tile, const Entries& entries, int c) {
    Acc* p = memory_.p.data();
    const uint16_t* ids = memory_.ids.data();
    __syncthreads();  // p of another class may still be read
    for_listed(memory_.near, near_count_, [&](int i, int row, int column) {
      const int y = clamp(tile.top + row, tile.H), x = clamp(tile.left + column, tile.W), at = labels.at(row, column);
      const PixelStats<Acc> stats =
          kKeepsStats ? memory_.stats.data()[i] : stats_at(args, entries, tile.n, y, x, label_of(ids[at]));
      p[at] = stats.probability(entries.at(tile.n, y, x, c));
    });
    __syncthreads();
  }

  // Calls f(at, G_x, G_y, and the estimates of both) of class c for the edges, `at` being their entry of `compared`.
  template <typename F>
  __device__ __forceinline__ void compare(int c, F f) const {
    const uint16_t* ids = memory_.ids.data();
    with_number<kMaxRadius>(radius_, [&](auto radius) {
      for_listed(memory_.edges, edge_count_, [&](int, int row, int column) {
        const int at = labels.at(row, column), pitch = labels.pitch;
        Acc gx = 0, gy = 0, px = 0, py = 0;
        for_taps<decltype(radius)::value, sizeof(Acc) == 4>([&](int u, int v, int along_x, int along_y) {
          const int from = at + u * pitch + v;
          const bool is_class = ids[from] == c;
          if (along_x != 0) gx += is_class ? Acc(along_x) : Acc(0), px += Acc(along_x) * p[from];
          if (along_y != 0) gy += is_class ? Acc(along_y) : Acc(0), py += Acc(along_y) * p[from];
        });
        f(compared_.at(row, column), gx, gy, px, py);
      });
    });
  }

  // The step cpg_residuals: finds the derivatives of the total by the estimates of class c, and waits for them.
  template <typename Entries>
  __device__ __forceinline__ void cpg_residuals(const LossArgs& args, const Tile& tile, const Entries& entries, int c) {
    load_class(args, tile, entries, c);
    const Acc count = static_cast<const Acc*>(args.summary)[kEdges];
    const Acc unit = static_cast<Acc>(sobel_denominator(radius_));
    const Acc upstream = *static_cast<const Acc*>(args.grad_total);
    const Acc scale = count != 0 ? 2 * static_cast<Acc>(args.cpg_weight) * upstream / count / (unit * unit) : Acc(0);
    Acc *of_x = memory_.residuals.data(), *of_y = of_x + compared_.count();
    compare(c, [&](int at, Acc gx, Acc gy, Acc px, Acc py) {
      of_x[at] = gx != 0 ? scale * (px - gx) : Acc(0);
      of_y[at] = gy != 0 ? scale * (py - gy) : Acc(0);
    });
    __syncthreads();
  }

  // Returns b, the derivative of the total by p of the class, at a pixel of the tile.
  __device__ __forceinline__ Acc b_at(const Tile& tile, int row, int column) const {
    const int y = tile.top + row, x = tile.left + column;
    // These are the rows and columns of the pixel and of its copies beyond the border.
    const int top = y == 0 ? row - radius_ : row, bottom = y == tile.H - 1 ? row + radius_ : row;
    const int left = x == 0 ? column - radius_ : column, right = x == tile.W - 1 ? column + radius_ : column;
    const Acc *of_x = memory_.residuals.data(), *of_y = of_x + compared_.count();
    const int pitch = compared_.pitch;
    Acc sum = 0;
    with_number<kMaxRadius>(radius_, [&](auto radius) {
#pragma unroll 1
      for (int i = top; i <= bottom; ++i)
#pragma unroll 1
        for (int j = left; j <= right; ++j) {
          const int at = compared_.at(i, j);
          for_taps<decltype(radius)::value, sizeof(Acc) == 4>([&](int u, int v, int along_x, int along_y) {
            if (!compared_.has(i - u, j - v)) return;
            const int from = at - u * pitch - v;  // G there has this pixel at (u, v)
            if (along_x != 0) sum += Acc(along_x) * of_x[from];
            if (along_y != 0) sum += Acc(along_y) * of_y[from];
          });
        }
    });
    return sum;
  }

 private:
  static constexpr bool kKeepsStats = WindowMemory<Acc>::kKeepsStats;
  static __device__ __forceinline__ int label_of(uint16_t id) { return id == kIgnoredId ? kIgnored : id; }
  __device__ __forceinline__ int words() const { return labels.rows() * BitMap::kAcross; }  // fewer than threads

  // Finds which pixels differ from their neighbours, and which are ignored: three bit maps, in `scratch`.
  __device__ __forceinline__ void find_changes(const uint16_t* ids) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    const int rows = labels.rows(), columns = labels.columns();
    for (int row = warp; row < rows; row += kWarps) {
      const uint16_t *of_row = ids + row * labels.pitch, *of_next = of_row + labels.pitch;
      for (int i = 0; i < BitMap::kAcross; ++i) {
        const int column = 32 * i + lane;
        const bool has = column < columns;
        const uint16_t id = has ? of_row[column] : kIgnoredId;
        const bool right = column + 1 < columns && of_row[column + 1] != id;
        const bool below = has && row + 1 < rows && of_next[column] != id;
        const unsigned found[] = {__ballot_sync(0xffffffffu, right), __ballot_sync(0xffffffffu, below),
                                  __ballot_sync(0xffffffffu, has && id == kIgnoredId)};
        for (int j = 0; lane == 0 && j < 3; ++j) scratch(j).words[row * BitMap::kAcross + i] = found[j];
      }
    }
  }
  __device__ __forceinline__ BitMap scratch(int i) const { return {memory_.scratch.data() + i * words()}; }
  // Returns a bit for each edge of a word: its window holds more than one label and, if cpg_window, no ignored one.
  __device__ __forceinline__ unsigned find_edges(const LossArgs& args, const Tile& tile, int row, int word) const {
    const int y = tile.top + row - labels.margin, rows = labels.rows();
    if (row < radius_ || row >= rows - radius_ || y < 0 || y >= tile.H) return 0;
    // A window is connected: if it holds several labels, two neighbours differ.
    unsigned found = scratch(0).spread(row - radius_, row + radius_, rows, word, -radius_, radius_ - 1) |
                     scratch(1).spread(row - radius_, row + radius_ - 1, rows, word, -radius_, radius_);
    found &= ~scratch(2).words[row * BitMap::kAcross + word];
    if (args.cpg_window) found &= ~scratch(2).spread(row - radius_, row + radius_, rows, word, -radius_, radius_);
    // Pixels begin..end-1 of the word lie in the image, and in the tile.
    const int first = 32 * word - labels.margin;
    return found & bits_below(tile.columns - first) & ~bits_below(-first);
  }
  static __device__ __forceinline__ unsigned bits_below(int i) { return i >= 32 ? ~0u : i > 0 ? (1u << i) - 1 : 0u; }

  // Writes the edges of the tile to its patches, or that there are none.
  __device__ __forceinline__ void store_edges(const Marks& marks, const Tile& tile, bool any) const {
    constexpr int kWords = kColumns / kPatchColumns;  // of a row
    const int row = static_cast<int>(threadIdx.x) / kWords, word = static_cast<int>(threadIdx.x) % kWords;
    if (row / kPatchRows * kPatchRows >= tile.rows || word * kPatchColumns >= tile.columns) return;
    const unsigned* words = edge_bits_.words + (row + labels.margin) * BitMap::kAcross + word;
    *marks.edges(tile.n, tile.top + row, tile.left + word * kPatchColumns) =
        any ? __funnelshift_r(words[0], words[1], labels.margin) : 0;
  }
  // Reads a word of the window's edges from the patches of all tiles.
  __device__ __forceinline__ unsigned recall_edges(const Marks& marks, const Tile& tile, int row, int word) const {
    const int y = tile.top + row - labels.margin, x = tile.left + 32 * word;
    const auto of_patch = [&](int x) { return x >= 0 && x < tile.W ? *marks.edges(tile.n, y, x) : 0; };
    const bool inside = y >= 0 && y < tile.H && row >= radius_ && row < labels.rows() - radius_;
    if (!inside) return 0;
    const unsigned found = __funnelshift_l(of_patch(x - 32), of_patch(x), labels.margin);
    const int end = labels.columns() - radius_ - 32 * word;  // of `compared`
    return found & bits_below(end) & ~bits_below(radius_ - 32 * word);
  }

  // Lists the edges, and the pixels near them with their labels and statistics, in a fixed order, so that sums over the
  // lists have the same bits every time.
  template <typename Entries>
  __device__ __forceinline__ void list(const LossArgs& args, const Marks& marks, const Tile& tile,
                                       const Entries& entries) {
    for (int i = threadIdx.x; i < ClassSet::kWords; i += kThreads) present.words[i] = 0;
    __syncthreads();  // all edges are there
    const int word = static_cast<int>(threadIdx.x), row = word / BitMap::kAcross, across = word % BitMap::kAcross;
    unsigned near = 0, edges = 0;
    if (word < words()) {
      edges = edge_bits_.words[word];
      near = edge_bits_.spread(row - radius_, row + radius_, labels.rows(), across, -radius_, radius_);
      near_bits_.words[word] = near;
    }
    int counts;  // of edges, and in the upper half of pixels near them
    const int before = scan_block(__popc(near) << 16 | __popc(edges), &counts);
    near_count_ = counts >> 16, edge_count_ = counts & 0xffff;
    put(near, row, across, memory_.near.data() + (before >> 16));
    put(edges, row, across, memory_.edges.data() + (before & 0xffff));
    __syncthreads();  // the lists are there
    uint16_t* ids = memory_.ids.data();
    for_listed(memory_.near, near_count_, [&](int i, int row, int column) {
      const int y = clamp(tile.top + row, tile.H), x = clamp(tile.left + column, tile.W);
      const int label = marks.class_of((tile.n * tile.H + y) * tile.W + x);
      if (kKeepsStats) memory_.stats.data()[i] = stats_at(args, entries, tile.n, y, x, label);
      ids[labels.at(row, column)] = static_cast<uint16_t>(label);
      if (label != kIgnored) present.add(label);
    });
    __syncthreads();  // classes and labels are there
  }
  // Writes the pixels of a word to a list: row << 8 | column of `labels`.
  static __device__ __forceinline__ void put(unsigned bits, int row, int word, uint16_t* list) {
    for (; bits != 0; bits &= bits - 1)
      *list++ = static_cast<uint16_t>(row << 8 | (32 * word + __ffs(static_cast<int>(bits)) - 1));
  }
  // Calls f(i, row, column) for the pixels of a list.
  template <typename F>
  __device__ __forceinline__ void for_listed(const SharedArray<uint16_t>& list, int count, F f) const {
    const uint16_t* pixels = list.data();
    for (int i = threadIdx.x; i < count; i += kThreads)
      f(i, (pixels[i] >> 8) - labels.margin, (pixels[i] & 255) - labels.margin);
  }

  int radius_;
  const Area& compared_;  // where G is compared
  const WindowMemory<Acc>& memory_;
  BitMap near_bits_, edge_bits_;  // pixels within a radius of an edge; edges
  int near_count_, edge_count_;
};

// Writes partial sums (2, tiles): of (G - its estimate)^2, and of |M|.
template <typename Entries>
__global__ void __launch_bounds__(kThreads, 2)
    cpg_compare(const __grid_constant__ LossArgs args, const __grid_constant__ Marks marks,
                const __grid_constant__ WindowMemory<typename Entries::Acc> memory, double* partials) {
  using Acc = typename Entries::Acc;
  const Tile tile(args);
  const Entries entries(args);
  Window<Acc> window(args, memory);
  const Acc unit = Acc(1) / static_cast<Acc>(sobel_denominator(args.cpg_radius));
  Acc sums[2] = {};
  if (!window.find(args, marks, tile, entries)) {
    if (threadIdx.x < 2) partials[threadIdx.x * static_cast<int64_t>(gridDim.x) + blockIdx.x] = 0;
    return;
  }
  const int C = static_cast<int>(args.C);
  for (int c = window.present.next(0, C); c < C; c = window.present.next(c + 1, C)) {
    window.load_class(args, tile, entries, c);
    window.compare(c, [&](int, Acc gx, Acc gy, Acc px, Acc py) {
      const Acc dx = gx != 0 ? unit * (gx - px) : Acc(0), dy = gy != 0 ? unit * (gy - py) : Acc(0);
      sums[0] += dx * dx + dy * dy;
      sums[1] += static_cast<Acc>((gx != 0) + (gy != 0));
    });
  }
  store_partials(sums, partials);
}

}  // namespace bcmf::device
