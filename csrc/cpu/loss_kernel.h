// The CPU kernels of bcmf::loss, compiled once per instruction set and chosen at run time. They are named after the
// steps in docs/definitions.md.
#pragma once

#include "common/args.h"
#include "cpu/axis.h"

namespace bcmf::cpu {

// The label rows of an image are cut into blocks, which depend on the shape alone. The partial sums of blocks are added
// up in their order, so that results have the same bits for any number of threads.
struct LossPartial {
  double weighted_nll, weight;  // sums over all valid pixels
  double hard_nll;              // weighted, over those above OHEM's threshold
  int64_t hard, valid;          // numbers of pixels above OHEM's threshold, and of valid ones
  int64_t bad_labels;

  BCMF_HOST_DEVICE void operator+=(const LossPartial& other) {
    weighted_nll += other.weighted_nll;
    weight += other.weight;
    hard_nll += other.hard_nll;
    hard += other.hard;
    valid += other.valid;
    bad_labels += other.bad_labels;
  }
};

struct TermPartial {  // of a label row, for OHEM, BCL or CPG
  double sum;
  int64_t count;

  BCMF_HOST_DEVICE void operator+=(const TermPartial& other) {
    sum += other.sum;
    count += other.count;
  }
};

// A run of pixels of a label row, at which CPG compares the gradients of class c: those whose windows lie within the
// kRunWindow columns from x on, which may begin or end outside of the image. Its residuals are kRunWindow values for x,
// then as many for y: the derivatives of the total by the estimates, which are sums of integer taps times p.
struct EdgeRun {
  int32_t x, c;
};
constexpr int64_t kRunWindow = 16;

// The runs of a row, and the residuals of one after the other, with kRunWindow zeros before the first. loss.cpp owns
// their memory, because the linker could merge the functions of a std::vector across instruction sets.
template <typename Acc>
struct RowEdgeRuns {
  const EdgeRun* runs;
  const Acc* residuals;
  int64_t count;
  void* store;
};
template <typename Acc>
void clear_edge_runs(RowEdgeRuns<Acc>& row);
template <typename Acc>
Acc* add_edge_run(RowEdgeRuns<Acc>& row, int64_t x, int64_t c);  // returns where its residuals go

// Tables and scratch memory that one forward or backward makes, and that all its kernels read.
template <typename Acc>
struct LossWork {
  int64_t pitch;          // pixels that a tile has room for: its logits are (C, pitch) acc
  int64_t strip;          // columns that a tile spans
  int64_t rows_per_tile;  // more than one if whole rows are short, and the logits are read directly
  int64_t blocks;         // how many an image has
  bool stream;            // the gradient is fp32, and so large that it does not stay in the cache
  const int64_t* row;     // (blocks + 1,): the first label row of each; a block lies between the same two logit rows
  const int64_t* block;   // (h + 1,): the first block whose upper logit row is this one or a later one
  AxisTable<Acc> vertical, horizontal;
  uint16_t* ids;               // (N, H, W) classes, or kIgnoredId; with BCL or CPG
  Acc* nll;                    // (N, H, W): -1 where ignored; with OHEM
  Acc* scores;                 // (BCL's steps, N, H, W): -1 where a label or a flipped one is ignored
  const int32_t* column_flip;  // (BCL's steps, W): pi of each column
  int64_t edge_rows;           // how many rows' edge runs the backward keeps: of a block and those around it; with CPG
  // (·, 2, C, w), backward of resampled logits: what each block from first_block on adds to the gradients of the logit
  // rows above and below it.
  Acc* halves;
  int64_t first_block;
};

template <typename Acc>
struct LossKernels {
  // These two work on the blocks begin..end of the N * blocks; `scratch` holds scratch_size(args, work) acc values.
  // dense_backward takes the steps cpg_residuals, cpg_shares and sparse_backward with it; it keeps the residuals of
  // work.edge_rows label rows in `edge_runs`.
  void (*dense_forward)(const LossArgs&, const LossWork<Acc>&, int64_t begin, int64_t end, Acc* scratch, LossPartial*);
  void (*dense_backward)(const LossArgs&, const LossWork<Acc>&, int64_t begin, int64_t end, Acc* scratch,
                         RowEdgeRuns<Acc>* edge_runs);
  // These work on the rows begin..end of the N * H label rows. read_ids fills LossWork::ids; cpg_compare takes the step
  // cpg_edges with it.
  void (*read_ids)(const LossArgs&, const LossWork<Acc>&, int64_t begin, int64_t end);
  void (*ohem_sum)(const LossArgs&, const LossWork<Acc>&, Acc cutoff, int64_t begin, int64_t end, TermPartial*);
  void (*bcl_select)(const LossArgs&, const LossWork<Acc>&, int index, int64_t begin, int64_t end, TermPartial*);
  void (*cpg_compare)(const LossArgs&, const LossWork<Acc>&, int64_t begin, int64_t end, TermPartial*);
  // Works on blocks, too: finds the class with the largest logit of each label pixel, as uint8 or, if there are more
  // than 256 classes, as int32; and counts them by label if there are bins.
  void (*argmax)(const LossArgs&, const LossWork<Acc>&, int64_t begin, int64_t end, Acc* scratch, void* classes,
                 int64_t* bins);
  // Works on the rows begin..end of the N * h logit rows.
  void (*low_gather)(const LossArgs&, const LossWork<Acc>&, int64_t begin, int64_t end);
};

struct LossIsaKernels {
  LossKernels<float> f32;
  LossKernels<double> f64;
};

constexpr int64_t kMaxTilePixels = 1024;

// A tile has about 64 KiB of fp32 logits, so that it stays in a cache of the core while it is read twice.
inline int64_t tile_pixels(int64_t classes) {
  const int64_t pixels = 16384 / classes / 64 * 64;
  return pixels < 64 ? 64 : pixels > kMaxTilePixels ? kMaxTilePixels : pixels;
}

// The acc values that a thread needs: tiles of logits, of the logit rows above and below, of two sums of gradients, and
// of CPG's products, with a byte for each class.
template <typename Acc>
int64_t scratch_size(const LossArgs& args, const LossWork<Acc>& work) {
  return 6 * args.C * work.pitch + args.C / static_cast<int64_t>(sizeof(Acc)) + 64;
}

}  // namespace bcmf::cpu
