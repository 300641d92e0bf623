// From the partial sums of tiles to the total: the steps add_tiles and loss_finish.
//
// The table of partial sums (rows, tiles) has a row for how many losses are above OHEM's threshold, then one for each
// entry of LossArgs::sums.
#pragma once

#include "common/terms.h"
#include "cuda/kernels/tile.cuh"

namespace bcmf::device {

enum Row : int { kHard, kSumRows };

BCMF_HOST_DEVICE int64_t rows_of(const LossArgs& args) { return kSumRows + kBclSums + 2 * args.bcl_steps; }

__device__ __forceinline__ bool is_summed(const LossArgs& args, int entry) {
  if (entry == kCeSum || entry == kCeCount) return args.ce;
  if (entry == kCpgSum || entry == kCpgCount) return args.cpg_radius > 0;
  return kSumRows + entry < rows_of(args);
}

// Finds the sums, each by a block.
template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    add_tiles(const __grid_constant__ LossArgs args, const double* partials, int64_t tiles) {
  const int entry = static_cast<int>(blockIdx.x);
  const bool counts = entry == kCeCount && !args.weight && !args.ohem;  // each valid pixel is 1, and counted elsewhere
  const int row = kSumRows + (counts ? static_cast<int>(kValidPixels) : entry);
  const double sum = is_summed(args, entry) ? load_partials(partials + row * tiles, tiles) : 0;
  if (threadIdx.x != 0) return;
  args.sums[entry] = sum;
  if (entry == 0 && !args.ohem) *static_cast<Acc*>(args.cutoff) = 0;
}

// One thread runs it.
template <typename Acc>
__global__ void loss_finish(const __grid_constant__ LossArgs args) {
  finish_loss<Acc>(args);
}

}  // namespace bcmf::device
