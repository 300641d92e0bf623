// The class of each label pixel: the lowest of those with the largest logit; NaN is larger than all, as in
// torch.argmax.
#pragma once

#include "logits.cuh"

namespace bcmf::device {

template <typename Source, typename Class>
__global__ void __launch_bounds__(kThreads) argmax_tiles(const __grid_constant__ LossArgs args, Class* classes) {
  using Acc = typename Source::Acc;
  const Tile tile(args);
  const Source source(args, tile);
  Acc best[kStack], z[kStack];
  int found[kStack] = {};
  source.stack(0, best);
  for (int64_t c = 1; c < args.C; ++c) {
    source.stack(c, z);
#pragma unroll
    for (int k = 0; k < kStack; ++k) {
      const bool better = z[k] > best[k] || (z[k] != z[k] && best[k] == best[k]);
      best[k] = better ? z[k] : best[k];
      found[k] = better ? static_cast<int>(c) : found[k];
    }
  }
  for_stack(tile, [&](int k) { classes[tile.pixel(args, k)] = static_cast<Class>(found[k]); });
}

}  // namespace bcmf::device
