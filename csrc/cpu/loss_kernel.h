// The CPU kernels of bcmf::loss, compiled once per instruction set and chosen at run time.
#pragma once

#include "../device/common.cuh"

namespace bcmf::cpu {

// An image is cut into tiles of consecutive pixels. Their size depends on C alone and their partial sums are added in
// index order, so that results are the same bits for any number of threads.
struct LossPartial {
  double weighted_nll, weight;  // without OHEM
  int64_t hard, valid;          // with OHEM: pixels above the threshold, and all that are not ignored
  int64_t bad_labels;
};

struct LossKernels {
  // Tiles begin..end of the N * tiles_per_image(args) tiles; `scratch` holds scratch_size(args) acc values.
  void (*forward)(const LossArgs& args, int64_t begin, int64_t end, void* scratch, LossPartial* partials);
  void (*backward)(const LossArgs& args, int64_t begin, int64_t end, void* scratch);
};

constexpr int64_t kMaxTilePixels = 1024;

// About 64 KiB of fp32 logits, so that a tile stays in a cache of the core while it is read twice.
inline int64_t tile_pixels(const LossArgs& args) {
  const int64_t pixels = 16384 / args.C / 64 * 64;
  return pixels < 64 ? 64 : pixels > kMaxTilePixels ? kMaxTilePixels : pixels;
}
inline int64_t tiles_per_image(const LossArgs& args) {
  return (args.H * args.W + tile_pixels(args) - 1) / tile_pixels(args);
}
inline int64_t scratch_size(const LossArgs& args) { return args.C * tile_pixels(args); }

extern const LossKernels loss_kernels_baseline, loss_kernels_avx2, loss_kernels_avx512;

}  // namespace bcmf::cpu
