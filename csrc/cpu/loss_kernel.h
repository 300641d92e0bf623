// The CPU kernels of bcmf::loss, compiled once per instruction set and chosen at run time.
#pragma once

#include "../device/common.cuh"

namespace bcmf::cpu {

// The label rows of an image are cut into blocks, which depend on the shape alone; a block's partial sums are added in
// index order, so that results are the same bits for any number of threads.
struct LossPartial {
  double weighted_nll, weight;  // of all pixels that are not ignored
  double hard_nll;              // weighted, of those above OHEM's threshold
  int64_t hard, valid;          // how many these are, and all that are not ignored
  int64_t bad_labels;
};

struct TermPartial {  // of BCL or CPG, by rows
  double sum;
  int64_t count;
};

// Pixels x0..x1 of a label row at which CPG compares the gradients of class c. Its residuals are 2 (x1 - x0) values, x
// then y, from `first` on: the derivatives of the total by the pixels' sums of taps.
struct Run {
  int32_t x0, x1, c, first;
};

// The runs of a row. Memory comes from loss.cpp: nothing that the linker could merge may be compiled for one
// instruction set.
template <typename Acc>
struct RowRuns {
  const Run* runs;
  const Acc* residuals;
  int64_t count;
  void* store;
};
template <typename Acc>
Acc* add_run(RowRuns<Acc>& row, int64_t x0, int64_t x1, int64_t c);  // where its residuals go

template <typename Acc>
struct AxisTable {  // of axis_tap, for each label row or column; null where logits have the size of the labels
  const int32_t *first, *second;
  const Acc* weight;
};

// What a call computes once and all its kernels read.
template <typename Acc>
struct LossWork {
  int64_t pitch;          // pixels of a tile, (C, pitch) acc
  int64_t strip;          // columns that a tile spans
  int64_t rows_per_tile;  // more than one if whole rows are short, and the logits are read directly
  int64_t blocks;         // of an image
  bool stream;            // the gradient is fp32, and so large that it does not stay in the cache
  const int64_t* row;     // (blocks + 1,): the first label row of each; all rows of a block lie between the same logits
  const int64_t* block;   // (h + 1,): the first block whose upper logit row is this one or a later one
  AxisTable<Acc> vertical, horizontal;
  uint16_t* ids;               // (N, H, W) classes, or kIgnoredId; with BCL or CPG
  uint8_t* edges;              // (N, H, W): 1 where CPG compares gradients
  Acc* nll;                    // (N, H, W): -1 where ignored; with OHEM
  Acc* scores;                 // (BCL's steps, N, H, W): q, -1 outside V3
  const int32_t* column_flip;  // (BCL's steps, W): pi of each column
  RowRuns<Acc>* runs;          // (N * H,), backward with CPG
  Acc* halves;  // (·, 2, C, w): gradients of the logit rows above and below each block from first_block on, resampled
  int64_t first_block;
};

template <typename Acc>
struct LossKernels {
  // Blocks begin..end of the N * blocks; `scratch` holds scratch_size(args, work) acc values.
  void (*forward)(const LossArgs&, const LossWork<Acc>&, int64_t begin, int64_t end, Acc* scratch, LossPartial*);
  void (*backward)(const LossArgs&, const LossWork<Acc>&, int64_t begin, int64_t end, Acc* scratch);
  // Rows begin..end of the N * H label rows.
  void (*identify)(const LossArgs&, const LossWork<Acc>&, int64_t begin, int64_t end);
  void (*sum_kept)(const LossArgs&, const LossWork<Acc>&, Acc cutoff, int64_t begin, int64_t end, TermPartial*);
  void (*find_edges)(const LossArgs&, const LossWork<Acc>&, int64_t begin, int64_t end);
  void (*select)(const LossArgs&, const LossWork<Acc>&, int index, int64_t begin, int64_t end, TermPartial*);
  void (*compare)(const LossArgs&, const LossWork<Acc>&, int64_t begin, int64_t end, TermPartial*);
  void (*find_residuals)(const LossArgs&, const LossWork<Acc>&, int64_t begin, int64_t end);
  // Blocks: the class with the largest logit of each label pixel, uint8 or, of more than 256 classes, int32; and, if
  // there are bins, their counts by label.
  void (*argmax)(const LossArgs&, const LossWork<Acc>&, int64_t begin, int64_t end, Acc* scratch, void* classes,
                 int64_t* bins);
  // Rows begin..end of the N * h logit rows.
  void (*join_halves)(const LossArgs&, const LossWork<Acc>&, int64_t begin, int64_t end);
};

struct LossIsaKernels {
  LossKernels<float> f32;
  LossKernels<double> f64;
};
extern const LossIsaKernels loss_kernels_baseline, loss_kernels_avx2, loss_kernels_avx512;

constexpr int64_t kMaxTilePixels = 1024;

// About 64 KiB of fp32 logits, so that a tile stays in a cache of the core while it is read twice.
inline int64_t tile_pixels(int64_t classes) {
  const int64_t pixels = 16384 / classes / 64 * 64;
  return pixels < 64 ? 64 : pixels > kMaxTilePixels ? kMaxTilePixels : pixels;
}

// acc values that a thread needs: tiles of logits, of the logit rows above and below, of two sums of gradients, of
// CPG's gradient of p; and a list of the entries that the last one has.
template <typename Acc>
int64_t scratch_size(const LossArgs& args, const LossWork<Acc>& work) {
  const int64_t tile = args.C * work.pitch;
  return 6 * tile + tile * static_cast<int64_t>(sizeof(int32_t) + sizeof(uint8_t)) / static_cast<int64_t>(sizeof(Acc)) +
         64;
}

}  // namespace bcmf::cpu
