// The arguments of bcmf::loss's kernels, and how a label is read.
// The files of this folder are what the CPU's and CUDA's kernels have in common. They include no header of torch.
#pragma once

#include <cstdint>

// These functions are always inlined: the CPU kernels are compiled for several instruction sets, and of a function that
// is not inlined the linker would keep one copy for all of them.
#if defined(__CUDACC__)
#define BCMF_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define BCMF_HOST_DEVICE inline __attribute__((always_inline))
#else
#define BCMF_HOST_DEVICE __forceinline
#endif

namespace bcmf {

enum class FloatType : int { f16, bf16, f32, f64 };
enum class LabelType : int { u8, i16, i32, i64 };

// Sizes and element strides have 64 bits, so that more than 2^31 elements work.
struct MapView {  // (N, C, H, W), any strides
  void* data;     // read-only except for the gradient
  FloatType type;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

struct LabelView {  // (N, H, W), any strides
  const void* data;
  LabelType type;
  int64_t stride_n, stride_h, stride_w;
};

constexpr int kMaxSteps = 8;  // of BCL

// The entries of LossArgs::sums, of LossArgs::summary, the numbers of the whole batch that the backward needs, and of
// LossArgs::terms. bcmf_ext/ops.py has the same ones; the names beside them go to Python (about.cpp), so that a test
// can compare both sides.
enum Sum : int {
  kCeSum,        // over the valid pixels, or those that OHEM keeps: weight times loss
  kCeCount,      // the sum of the valid pixels' weights, with OHEM the number of kept pixels
  kValidPixels,  // |V|
  kBadLabels,
  kCpgSum,
  kCpgCount,  // |M|
  kBclSums,   // of the losses that the first step selects, and their number |S|; then those of the other steps
  kSums = kBclSums + 2 * kMaxSteps
};
constexpr const char* kSumNames[] = {"ce_sum", "ce_count", "valid", "bad_labels", "cpg_sum", "cpg_count", "bcl"};

enum Summary : int {
  kDenominator,  // kCeCount
  kCutoff,       // the smallest loss that OHEM keeps
  kValid,        // |V|
  kEdges,        // |M| of CPG
  kSelected,     // |S| of BCL, for each of its steps
  kSummarySize = kSelected + kMaxSteps
};
constexpr const char* kSummaryNames[] = {"denominator", "cutoff", "valid", "edges", "selected"};

enum Term : int { kCe, kBcl, kCpg, kTerms };
constexpr const char* kTermNames[] = {"ce", "bcl", "cpg"};

// The arguments of bcmf::loss_sums, bcmf::loss_finish and bcmf::loss_backward. `acc` is float, or double for fp64
// logits.
struct LossArgs {
  int64_t N, C, H, W;  // of the labels
  int64_t h, w;        // of the logits, which are resampled bilinearly if these differ
  bool align_corners;
  MapView logits;
  LabelView labels;
  int64_t ignore_index;
  const void* weight;  // (C,) acc, contiguous; null: all ones
  bool ce;             // the cross-entropy is part of the total
  bool ohem;
  double ohem_cutoff;  // the smallest acc that exceeds -ln(threshold)
  int64_t ohem_min_kept;
  int bcl_steps;  // how many; 0: without BCL
  int bcl_step[kMaxSteps];
  bool bcl_flipped;
  double bcl_weight, bcl_alpha, bcl_beta;
  double bcl_cutoff;  // -ln(threshold); scores above it, rounded to acc, are selected
  int bcl_nms_radius;
  int cpg_radius;  // 0: without CPG
  bool cpg_window;
  double cpg_weight;
  void* nll;       // (N, H, W) acc, contiguous, forward with OHEM only: -1 where ignored, NaN at a bad label
  void* stats;     // (2, N, H, W) acc, contiguous: m = max_c Z_c, then log sum_c exp(Z_c - m); CUDA: stats.cuh
  void* selected;  // (N, H, W) uint8, contiguous: bit s is S of BCL's step s; null without BCL
  void* marks;     // what CUDA's kernels have read of the labels (cuda/kernels/marks.cuh); null elsewhere
  double* sums;    // (kSums,): numerators and denominators of all means; 0 for a term that is not asked for
  void* cutoff;    // () acc: the smallest loss that OHEM keeps; 0 without OHEM
  void* total;     // () acc
  void* terms;     // (kTerms,) acc
  void* summary;   // (kSummarySize,) acc
  // These are for the backward only.
  const void* grad_total;  // () acc
  MapView grad;            // same dtype as logits

  BCMF_HOST_DEVICE bool resampled() const { return h != H || w != W; }
};

// read_label returns these beside the classes 0..C-1.
constexpr int kIgnored = -1;
constexpr int kBad = -2;  // neither a class nor ignore_index: NaN on CUDA, ValueError on CPU

// BCL and CPG keep labels as 16-bit ids: a class, or this id where the label is no class.
constexpr uint16_t kIgnoredId = 0xffff;

// Labels are widened to 64 bits before any comparison, so that uint8 255 and ignore_index = -1 stay apart.
BCMF_HOST_DEVICE int64_t raw_label(const LabelView& labels, int64_t offset) {
  switch (labels.type) {
    case LabelType::u8:
      return static_cast<const uint8_t*>(labels.data)[offset];
    case LabelType::i16:
      return static_cast<const int16_t*>(labels.data)[offset];
    case LabelType::i32:
      return static_cast<const int32_t*>(labels.data)[offset];
    default:
      return static_cast<const int64_t*>(labels.data)[offset];
  }
}

BCMF_HOST_DEVICE int classify_label(int64_t label, int64_t C, int64_t ignore_index) {
  if (label == ignore_index) return kIgnored;
  return label >= 0 && label < C ? static_cast<int>(label) : kBad;
}

BCMF_HOST_DEVICE int read_label(const LossArgs& args, int64_t n, int64_t y, int64_t x) {
  const LabelView& v = args.labels;
  const int64_t label = raw_label(v, n * v.stride_n + y * v.stride_h + x * v.stride_w);
  return classify_label(label, args.C, args.ignore_index);
}

}  // namespace bcmf
