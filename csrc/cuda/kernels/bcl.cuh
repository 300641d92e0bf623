// The Boundary Corrected Loss (BCL): the score of a pixel, the step bcl_select, and what the selected pixels add to the
// gradient.
#pragma once

#include "cuda/kernels/logits.cuh"
#include "cuda/kernels/marks.cuh"

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

// The scores (N, H, W) of a step. Of a patch's rows only those are written that have one above the threshold, which its
// bits `hot` tell.
template <typename Acc>
struct Scores {
  const Acc* map;
  int step;

  // Tells whether a pixel's score is the largest of its neighbourhood, which is clipped at the border.
  __device__ __forceinline__ bool is_largest(const LossArgs& args, const Marks& marks, const Tile& tile, int y, int x,
                                             Acc own) const {
    const int radius = args.bcl_nms_radius;
    const int top = y < radius ? 0 : y - radius, bottom = tile.H - 1 - y < radius ? tile.H - 1 : y + radius;
    const int left = x < radius ? 0 : x - radius, right = tile.W - 1 - x < radius ? tile.W - 1 : x + radius;
    bool largest = true;
    for (int v = top; v <= bottom; ++v) {
      const Patch* patches = marks.patch(tile.n, v, 0);
      const Acc* row = map + (tile.n * tile.H + v) * tile.W;
      for (int u = left; u <= right; ++u)
        if (patches[u / kPatchColumns].hot[step] >> v % kPatchRows & 1)
          largest = largest && row[u] <= own;  // NaN is larger
    }
    return largest;
  }
};

// Stores the scores of a stack where its rows have one above the threshold, and returns a bit for each such row of the
// patch. All threads of the warp call it.
template <typename Stack, typename Acc>
__device__ __forceinline__ unsigned store_hot(const Stack& tile, const Acc (&q)[kStack], Acc cutoff, Acc* map) {
  unsigned rows = 0;
  if constexpr (Stack::kAcross) {
    bool hot = false;
    tile.for_each([&](int k) { hot = hot || !(q[k] <= cutoff); });  // also NaN
    const unsigned lanes = __ballot_sync(0xffffffffu, hot);
#pragma unroll
    for (int row = 0; row < kPatchRows; ++row) rows |= (lanes >> 8 * row & 0xff ? 1u : 0u) << row;
    if (rows >> tile.first_row % kPatchRows & 1) tile.store(q, map);
  } else {
#pragma unroll
    for (int k = 0; k < kStack; ++k) {
      if (!__any_sync(0xffffffffu, tile.has(k) && !(q[k] <= cutoff))) continue;
      rows |= 1u << k;
      if (tile.has(k)) map[tile.pixel(k)] = q[k];
    }
  }
  return rows;
}

// Tells whether a step has scores above the threshold in the tile. All threads of a warp call it together.
__device__ __forceinline__ bool is_tile_hot(const Marks& marks, const Tile& tile, int step) {
  constexpr int kAcross = kColumns / kPatchColumns;
  const int patch = static_cast<int>(threadIdx.x) % kWarps;
  const int row = patch / kAcross * kPatchRows, column = patch % kAcross * kPatchColumns;
  const bool hot = row < tile.rows && column < tile.columns &&
                   marks.patch(tile.n, tile.top + row, tile.left + column)->hot[step] != 0;
  return __any_sync(0xffffffffu, hot);
}

// Returns a bit for each pixel of a stack whose score is not exceeded by those beside, above and below it in its patch.
// All threads of a warp call it together.
template <typename Acc>
__device__ __forceinline__ unsigned largest_of_neighbours(const Acc (&q)[kStack]) {
  unsigned found = 0;
#pragma unroll
  for (int k = 0; k < kStack; ++k) {
    const Acc left = __shfl_up_sync(0xffffffffu, q[k], 1), right = __shfl_down_sync(0xffffffffu, q[k], 1);
    bool largest = left <= q[k] && right <= q[k];  // NaN is larger
    if (k > 0) largest = largest && q[k - 1] <= q[k];
    if (k + 1 < kStack) largest = largest && q[k + 1] <= q[k];
    found |= static_cast<unsigned>(largest) << k;
  }
  return found;
}

// Writes `selected`, in which each of BCL's steps has a bit, and for each step partial sums (2, tiles): of the losses
// at its selected pixels, and of their number. Pixels that may be selected are listed, because they are few.
template <typename Entries>
__global__ void __launch_bounds__(kThreads, 2)
    bcl_select(const __grid_constant__ LossArgs args, const typename Entries::Acc* scores, double* partials) {
  using Acc = typename Entries::Acc;
  BCMF_SHARED(uint16_t, listed, kRows* kColumns);
  BCMF_SHARED(uint8_t, selected, kRows* kColumns);
  const Stacks<false> tile(args);
  const Entries entries(args);
  const Marks marks(args);
  const int64_t pixels = args.N * args.H * args.W;
  const Acc cutoff = static_cast<Acc>(args.bcl_cutoff);
  const auto place = [&](int k) { return tile.row(k) * kColumns + tile.column(k); };
  for (int k = 0; k < kStack; ++k) selected[place(k)] = 0;
  for (int s = 0; s < args.bcl_steps; ++s) {
    double* sums_of_step = partials + 2 * s * static_cast<int64_t>(gridDim.x);
    if (!is_tile_hot(marks, tile, s)) {
      if (threadIdx.x < 2) sums_of_step[threadIdx.x * static_cast<int64_t>(gridDim.x) + blockIdx.x] = 0;
      continue;
    }
    const Scores<Acc> of_step = {scores + s * pixels, s};
    const unsigned hot = tile.has_patch() ? marks.patch(tile.n, tile.y(0), tile.x(0))->hot[s] : 0;
    Acc q[kStack] = {-1, -1, -1, -1};
    tile.for_each([&](int k) {
      if (hot >> k & 1) q[k] = of_step.map[tile.pixel(k)];
    });
    unsigned found = args.bcl_nms_radius > 0 ? largest_of_neighbours(q) : ~0u;
    for (int k = 0; k < kStack; ++k)
      if (!(q[k] > cutoff)) found &= ~(1u << k);
    for (int k = 0; k < kStack; ++k)
      if (q[k] != q[k]) found |= 1u << k;
    found &= (1u << kStack) - 1;
    int count;
    int before = scan_block(__popc(found), &count);
    for (; found != 0; found &= found - 1)
      listed[before++] = static_cast<uint16_t>(place(__ffs(static_cast<int>(found)) - 1));
    __syncthreads();  // the list is read
    double sums[2] = {};
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const int y = tile.top + listed[i] / kColumns, x = tile.left + listed[i] % kColumns;
      const int64_t pixel = (tile.n * tile.H + y) * tile.W + x;
      const Acc q = of_step.map[pixel];
      if (q == q && !of_step.is_largest(args, marks, tile, y, x, q)) continue;
      // Labels are not believed to be those that the scores are of: there may be no class here now.
      const auto loss = [&](int c) -> Acc {
        if (c == kIgnored) return 0;
        const Acc* m = static_cast<const Acc*>(args.stats) + pixel;
        return (m[0] - entries.at(tile.n, y, x, c)) + m[pixels];
      };
      if (args.bcl_flipped) {
        const Flipped flipped(marks, args.bcl_step[s], tile, y, x);
        sums[0] += static_cast<Acc>(args.bcl_alpha) * loss(flipped.by_rows) +
                   static_cast<Acc>(args.bcl_beta) * loss(flipped.by_columns);
      } else {
        sums[0] += loss(marks.class_of(pixel));
      }
      sums[1] += 1;
      selected[listed[i]] = static_cast<uint8_t>(selected[listed[i]] | 1 << s);
    }
    store_partials(sums, sums_of_step);  // its barriers also keep the next step from the list
  }
  __syncthreads();  // `selected` is read by others
  uint8_t own[kStack];
  bool any = false;
  for (int k = 0; k < kStack; ++k) {
    own[k] = selected[place(k)];
    any = any || own[k] != 0;
  }
  tile.store(own, static_cast<uint8_t*>(args.selected));
  any = __any_sync(0xffffffffu, any);
  if (any && threadIdx.x % kWarp == 0) marks.patch(tile.n, tile.y(0), tile.x(0))->selected = 1;
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
