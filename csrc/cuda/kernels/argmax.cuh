// The class of each label pixel is the lowest of those with the largest logit; NaN is larger than all, as in
// torch.argmax. The kernel reads C logits per label pixel (resampled ones from L1) and writes 1 byte, or 4 if there are
// more than 256 classes.
#pragma once

#include "cuda/kernels/logits.cuh"

namespace bcmf::device {

// classes: (N, H, W) uint8, or int32 if there are more than 256.
template <typename Source>
__global__ void __launch_bounds__(kThreads, 2)
    argmax(const __grid_constant__ LossArgs args, const __grid_constant__ typename Source::Staged staged,
           void* classes) {
  using Acc = typename Source::Acc;
  const typename Source::Tile tile(args);
  const Source source(args, tile, staged);
  const int C = static_cast<int>(args.C);
  Acc best[kStack];
  int found[kStack] = {};
#pragma unroll
  for (int k = 0; k < kStack; ++k) best[k] = static_cast<Acc>(-INFINITY);
  for_classes(source, C, [&](int first, const auto& z) {
    constexpr int kCount = sizeof(z) / sizeof(z[0]);
#pragma unroll
    for (int j = 0; j < kCount; ++j)
#pragma unroll
      for (int k = 0; k < kStack; ++k) {
        const bool better = z[j][k] > best[k] || (z[j][k] != z[j][k] && best[k] == best[k]);
        best[k] = better ? z[j][k] : best[k];
        found[k] = better ? first + j : found[k];
      }
  });
  if (C > 256) return tile.store(found, static_cast<int32_t*>(classes));
  uint8_t narrowed[kStack];
  for (int k = 0; k < kStack; ++k) narrowed[k] = static_cast<uint8_t>(found[k]);
  tile.store(narrowed, static_cast<uint8_t*>(classes));
}

}  // namespace bcmf::device
