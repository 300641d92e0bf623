// The Boundary Corrected Loss (BCL): the score of a pixel, the step bcl_select, and what the selected pixels add to the
// gradient.
#pragma once

#include <type_traits>

#include "cuda/kernels/marks.cuh"
#include "cuda/kernels/stats.cuh"

namespace bcmf::device {

// The classes that the two flips of a step bring to a pixel.
struct Flipped {
  int by_rows, by_columns;
  __device__ __forceinline__ Flipped(const Marks& marks, int step, const Tile& tile, int y, int x)
      : by_rows(marks.class_of((tile.n * tile.H + flip(y, step, tile.H)) * tile.W + x)),
        by_columns(marks.class_of((tile.n * tile.H + y) * tile.W + flip(x, step, tile.W))) {}

 private:
  static __device__ __forceinline__ int flip(int i, int step, int length) {  // unsigned: i + step may pass 2^31
    return static_cast<int>(flip_index<unsigned>(i, step, length));
  }
};

// Returns the score of a pixel that has a class: the largest of its three losses, or -1 if a flipped label is ignored.
template <typename Acc, typename F>
__device__ __forceinline__ Acc score_of(const Marks& marks, int step, const Tile& tile, int y, int x, int label,
                                        Acc nll, F loss_of_class) {
  const Flipped flipped(marks, step, tile, y, x);
  if (flipped.by_rows == kIgnored || flipped.by_columns == kIgnored) return Acc(-1);
  Acc score = nll;
  const int others[] = {flipped.by_rows, flipped.by_columns};
  for (const int other : others) {
    if (other == label) continue;
    const Acc loss = loss_of_class(other);
    score = loss > score ? loss : score;
  }
  return score;
}

// Returns what a pixel adds to a step's sum if it is selected; loss(c) is that of class c.
template <typename Acc, typename F>
__device__ __forceinline__ Acc selected_loss(const LossArgs& args, const Marks& marks, int step, const Tile& tile,
                                             int y, int x, int label, F loss) {
  // The marks may have been overwritten since the scores were found: a pixel without a class adds 0.
  const auto of = [&](int c) { return c < 0 ? Acc(0) : loss(c); };
  if (!args.bcl_flipped) return of(label);
  const Flipped flipped(marks, step, tile, y, x);
  return static_cast<Acc>(args.bcl_alpha) * of(flipped.by_rows) +
         static_cast<Acc>(args.bcl_beta) * of(flipped.by_columns);
}

// What a patch leaves of a step's scores for bcl_select, by row a bit for each pixel.
struct alignas(16) PatchScores {
  unsigned undecided[kPatchRows];  // it is selected unless the score of another tile is larger
  unsigned hot[kPatchRows];        // its score is above the threshold, or NaN
};

// Returns a bit for each of a stack's pixels first..first+3, along an axis on which the tile has `length` pixels, that
// another tile before or behind it is within a radius of.
__device__ __forceinline__ unsigned reaching_out(int first, int length, int radius, bool before, bool behind) {
  const int low = radius - first, high = length - radius - first;  // pixels below `low`, and from `high` on
  const unsigned below_low = low <= 0 ? 0 : low >= kStack ? ~0u : (1u << low) - 1;
  const unsigned below_high = high <= 0 ? 0 : high >= kStack ? ~0u : (1u << high) - 1;
  return (before ? below_low : 0) | (behind ? ~below_high : 0);
}
// The same for both axes.
template <typename Stack>
__device__ __forceinline__ unsigned reaching_out(const Stack& tile, int radius) {
  const unsigned down = reaching_out(tile.first_row, kRows, radius, tile.top > 0, tile.H - tile.top > kRows);
  const unsigned across =
      reaching_out(tile.first_column, kColumns, radius, tile.left > 0, tile.W - tile.left > kColumns);
  const auto of_first = [](unsigned bits) { return (bits & 1) != 0 ? ~0u : 0u; };
  return Stack::kAcross ? of_first(down) | across : down | of_first(across);
}

// The scores of a step, and what patches leave of them.
template <typename Acc>
struct Scores {
  Acc* map;              // (N, H, W), filled in at hot pixels that other tiles' neighbourhoods reach
  PatchScores* patches;  // numbered as those of Marks

  // Returns those of step s, if these are of the first one.
  __device__ __forceinline__ Scores of_step(const LossArgs& args, int s) const {
    return {map + s * args.N * args.H * args.W, patches + s * Marks::patch_count(args)};
  }

  // Tells whether no score of another tile is larger than a pixel's own. NaN is larger than all.
  __device__ __forceinline__ bool is_largest_outside(const LossArgs& args, const Marks& marks, const Tile& tile, int y,
                                                     int x) const {
    const int radius = args.bcl_nms_radius;
    const int top = y < radius ? 0 : y - radius, bottom = tile.H - 1 - y < radius ? tile.H - 1 : y + radius;
    const int left = x < radius ? 0 : x - radius, right = tile.W - 1 - x < radius ? tile.W - 1 : x + radius;
    const Acc own = map[(tile.n * tile.H + y) * tile.W + x];
    bool largest = true;
    for (int v = top; v <= bottom; ++v)
      for (int u = left; u <= right; ++u) {
        const bool inside = v >= tile.top && v < tile.top + kRows && u >= tile.left && u < tile.left + kColumns;
        if (inside || !(patches[marks.patch_index(tile.n, v, u)].hot[v % kPatchRows] >> u % kPatchColumns & 1))
          continue;
        largest = largest && map[(tile.n * tile.H + v) * tile.W + u] <= own;
      }
    return largest || own != own;
  }
};

// The scores of a tile as integers that have their order, in shared memory: -1, which is no score, is less than all
// others, and NaN is larger. A margin is beside the tile, so that each pixel has neighbours.
template <typename Acc>
struct ScoreKeys {
  using Key = std::conditional_t<sizeof(Acc) == 8, long long, int>;
  static constexpr int kMargin = 4, kPitch = kColumns + 2 * kMargin, kCount = (kRows + 2) * kPitch;
  Key *own, *other;  // two maps, so that one barrier is enough for each spread

  static SharedArray<Key> take(const LossArgs& args, SharedCutter& shared) {
    return shared.take<Key>(args.bcl_steps > 0 ? 2 * kCount : 0);
  }
  __device__ __forceinline__ explicit ScoreKeys(const SharedArray<Key>& memory)
      : own(memory.data()), other(own + kCount) {}

  static __device__ __forceinline__ Key of(Acc score) {
    Key key;
    memcpy(&key, &score, sizeof(key));
    return score == score ? key : static_cast<Key>(~(Key{1} << (8 * sizeof(Key) - 1)));
  }
  // Fills the margins. All threads of the block call it, before they wait for each other in spread.
  __device__ __forceinline__ void clear() const {
    constexpr int kOfRow = 2 * kMargin, kBeside = kRows * kOfRow;
    for (int i = threadIdx.x; i < kBeside + 2 * kPitch; i += kThreads) {
      const int column = i % kOfRow, above = i - kBeside;
      const int place = i < kBeside ? (1 + i / kOfRow) * kPitch + column + (column < kMargin ? 0 : kColumns)
                                    : above + (above < kPitch ? 0 : kRows * kPitch);
      own[place] = other[place] = of(Acc(-1));
    }
  }
  // Replaces the keys of a stack by the largest of its pixel and the two beside it in a row, or above and below. All
  // threads of the block call it.
  template <bool kInRow, typename Stack>
  __device__ __forceinline__ void spread(const Stack& tile, Key (&keys)[kStack]) {
    Key* stack = own + (1 + tile.first_row) * kPitch + kMargin + tile.first_column;
    constexpr int kNext = Stack::kAcross ? 1 : kPitch;
    store<Stack>(keys, stack);
    __syncthreads();  // the keys of all threads are there
    if constexpr (kInRow == Stack::kAcross) {
      // The neighbours in the stack are known.
      Key last = entry<Stack, kStack - 1>(stack - kStack * kNext);
      const Key after = entry<Stack, 0>(stack + kStack * kNext);
#pragma unroll
      for (int k = 0; k < kStack; ++k) {
        const Key here = keys[k];
        keys[k] = larger(larger(last, here), k + 1 < kStack ? keys[k + 1] : after);
        last = here;
      }
    } else {
      constexpr int kStep = kInRow ? 1 : kPitch;
      Key before[kStack], after[kStack];
      load<Stack>(stack - kStep, before), load<Stack>(stack + kStep, after);
#pragma unroll
      for (int k = 0; k < kStack; ++k) keys[k] = larger(keys[k], larger(before[k], after[k]));
    }
    Key* const written = own;
    own = other, other = written;
  }

 private:
  template <typename Stack>
  static __device__ __forceinline__ void load(const Key* from, Key (&keys)[kStack]) {
    if constexpr (Stack::kAcross) {
      load_pack(from, keys);
    } else {
#pragma unroll
      for (int k = 0; k < kStack; ++k) keys[k] = from[k * kPitch];
    }
  }
  // Reads an entry of another stack; those beside each other together, which takes the banks once.
  template <typename Stack, int k>
  static __device__ __forceinline__ Key entry(const Key* from) {
    if constexpr (!Stack::kAcross) return from[k * kPitch];
    Key keys[kStack];
    load<Stack>(from, keys);
    for (Key& key : keys) keep(key);
    return keys[k];
  }
  template <typename Stack>
  static __device__ __forceinline__ void store(const Key (&keys)[kStack], Key* to) {
    if constexpr (Stack::kAcross) {
      store_pack(keys, to);
    } else {
#pragma unroll
      for (int k = 0; k < kStack; ++k) to[k * kPitch] = keys[k];
    }
  }
};

// Returns, by row of the warp's patch, a bit for each of its pixels, from those of the stacks.
template <typename Stack>
__device__ __forceinline__ void bits_of_rows(const Stack& tile, unsigned of_stack, unsigned (&rows)[kPatchRows]) {
  if constexpr (Stack::kAcross) {
    constexpr int kPerRow = kPatchColumns / kStack;
    unsigned row = of_stack << tile.first_column % kPatchColumns;
    for (int lanes = 1; lanes < kPerRow; lanes *= 2) row |= __shfl_xor_sync(0xffffffffu, row, lanes);
#pragma unroll
    for (int k = 0; k < kPatchRows; ++k) rows[k] = __shfl_sync(0xffffffffu, row, k * kPerRow);
  } else {
#pragma unroll
    for (int k = 0; k < kPatchRows; ++k) rows[k] = __ballot_sync(0xffffffffu, of_stack >> k & 1);
  }
}

// The step bcl_select as far as the tile can tell: returns a bit for each pixel of a stack that is selected, and leaves
// the rest to the kernel bcl_select. q: the scores, -1 beyond the border of the image. All threads of the block call
// it.
template <typename Stack, typename Acc>
__device__ __forceinline__ unsigned select_inside(const LossArgs& args, const Marks& marks, const Stack& tile,
                                                  const Acc (&q)[kStack], const Scores<Acc>& scores,
                                                  ScoreKeys<Acc>& shared) {
  using Key = typename ScoreKeys<Acc>::Key;
  const int radius = args.bcl_nms_radius;
  Key largest[kStack];
#pragma unroll
  for (int k = 0; k < kStack; ++k) largest[k] = shared.of(q[k]);
  // Beyond the tile there is nothing more to find, however large the neighbourhood.
  for (int i = 0; i < radius && i < kColumns - 1; ++i) shared.template spread<true>(tile, largest);
  for (int i = 0; i < radius && i < kRows - 1; ++i) shared.template spread<false>(tile, largest);
  const unsigned out = reaching_out(tile, radius);
  unsigned hot = 0, largest_ones = 0;
#pragma unroll
  for (int k = 0; k < kStack; ++k) {
    const unsigned bit = 1u << k;
    if (q[k] <= static_cast<Acc>(args.bcl_cutoff)) continue;  // not where q is NaN
    hot |= bit;
    if (out & bit) scores.map[tile.pixel(k)] = q[k];
    if (shared.of(q[k]) == largest[k]) largest_ones |= bit;
  }
  if (tile.has_patch()) {
    PatchScores patch;
    bits_of_rows(tile, largest_ones & out, patch.undecided);
    bits_of_rows(tile, hot, patch.hot);
    if (threadIdx.x % kWarp == 0) scores.patches[marks.patch_index(tile.n, tile.y(0), tile.x(0))] = patch;
  }
  return largest_ones & ~out;
}

// Decides on the pixels that select_inside has left: a warp has a tile, a lane a row of a patch. It completes
// `selected`, and adds to the partial sums (2, tiles) of each step.
template <typename Entries>
__global__ void __launch_bounds__(kThreads, 2)
    bcl_select(const __grid_constant__ LossArgs args, const __grid_constant__ Marks marks,
               Scores<typename Entries::Acc> all, double* partials) {
  using Acc = typename Entries::Acc;
  const int64_t tiles = tiles_of(args);
  const unsigned index = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (index >= tiles) return;
  const Tile tile(args, index);
  const Entries entries(args);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, patch_of_tile = lane / kPatchRows;
  constexpr int kAcross = kColumns / kPatchColumns;
  static_assert(kWarp == kRows * kAcross);
  const int y = tile.top + patch_of_tile / kAcross * kPatchRows + lane % kPatchRows;
  const int left = tile.left + patch_of_tile % kAcross * kPatchColumns;
  const bool inside = y < tile.H && left < tile.W;
  const int64_t patch = inside ? marks.patch_index(tile.n, y, left) : 0;
  bool any = false;
  for (int s = 0; s < args.bcl_steps; ++s) {
    const Scores<Acc> scores = all.of_step(args, s);
    unsigned undecided = inside ? scores.patches[patch].undecided[lane % kPatchRows] : 0;
    if (!__any_sync(0xffffffffu, undecided != 0)) continue;
    Acc sums[2] = {};
    for (; undecided != 0; undecided &= undecided - 1) {
      const int x = left + __ffs(static_cast<int>(undecided)) - 1;
      if (!scores.is_largest_outside(args, marks, tile, y, x)) continue;
      const int64_t pixel = (tile.n * tile.H + y) * tile.W + x;
      const int label = marks.class_of(pixel);
      const PixelStats<Acc> stats = stats_at(args, entries, tile.n, y, x, label);
      sums[0] += selected_loss<Acc>(args, marks, args.bcl_step[s], tile, y, x, label,
                                    [&](int c) { return stats.loss(entries.at(tile.n, y, x, c)); });
      sums[1] += 1;
      uint8_t* selected = static_cast<uint8_t*>(args.selected) + pixel;
      *selected = static_cast<uint8_t>(*selected | 1 << s);
      any = true;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Acc sum = sum_of_warp(sums[i]);
      if (lane == 0) partials[(2 * s + i) * tiles + index] += sum;
    }
  }
  const unsigned rows = __ballot_sync(0xffffffffu, any);
  if (lane % kPatchRows == 0 && (rows >> lane & ((1u << kPatchRows) - 1)) != 0)
    marks.patch(tile.n, y, left)->selected = 1;
}

// Returns the steps that selected a pixel, a bit each. Bits of steps that do not exist are masked, whoever wrote them.
__device__ __forceinline__ unsigned steps_of(const LossArgs& args, int64_t pixel) {
  return static_cast<const uint8_t*>(args.selected)[pixel] & ((1u << args.bcl_steps) - 1);
}

// Returns the sum of the pulls towards a pixel's flipped labels, which its factor grows by.
template <typename Acc>
__device__ __forceinline__ Acc flipped_pull(const LossArgs& args, unsigned selected) {
  if (selected == 0) return 0;
  const Acc scale = bcl_scale<Acc>(args, static_cast<const Acc*>(args.summary)[kValid]);
  return static_cast<Acc>(__popc(selected)) * scale * static_cast<Acc>(args.bcl_alpha + args.bcl_beta);
}

// Calls f(class, pull) for the pulls towards the flipped labels of a pixel of the tile.
template <typename Acc, typename F>
__device__ __forceinline__ void for_flipped(const LossArgs& args, const Marks& marks, unsigned selected,
                                            const Tile& tile, int row, int column, F f) {
  if (selected == 0) return;
  const Acc scale = bcl_scale<Acc>(args, static_cast<const Acc*>(args.summary)[kValid]);
  for (unsigned steps = selected; steps != 0; steps &= steps - 1) {
    const Flipped flipped(marks, args.bcl_step[__ffs(static_cast<int>(steps)) - 1], tile, tile.top + row,
                          tile.left + column);
    if (flipped.by_rows >= 0) f(flipped.by_rows, scale * static_cast<Acc>(args.bcl_alpha));
    if (flipped.by_columns >= 0) f(flipped.by_columns, scale * static_cast<Acc>(args.bcl_beta));
  }
}

}  // namespace bcmf::device
