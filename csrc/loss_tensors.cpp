#include "loss_tensors.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/memory.h"

namespace bcmf {
namespace {

Kind acc_kind(const Tensor& logits) { return kind_of(logits).with(acc_type(logits)); }

void check_sides(const LossArgs& args) {
  for (const int64_t side : {args.C, args.h, args.w, args.H, args.W}) check_side(side);
}

void set_sizes(const Tensor& logits, const Tensor& target, LossArgs& args) {
  BCMF_CHECK(logits.dim() == 4 && logits.size(1) >= 2, "logits have the shape (N, C, h, w) with C >= 2, not ",
             words(logits.sizes()), ".");
  BCMF_CHECK(target.dim() == 3 && target.size(0) == logits.size(0),
             "target has the shape (N, H, W) with the logits' N = ", logits.size(0), ", not ", words(target.sizes()),
             ".");
  check_same_device(logits, target, "logits", "target");
  args.N = logits.size(0);
  args.C = logits.size(1);
  args.h = logits.size(2);
  args.w = logits.size(3);
  args.H = target.size(1);
  args.W = target.size(2);
  BCMF_CHECK(target.numel() == 0 || logits.numel() > 0, "logits of the size ", words(logits.sizes()),
             " cannot be resampled to ", words(target.sizes()), ".");
  check_sides(args);
}

double nll_of(double probability, const char* name) {
  BCMF_CHECK(probability > 0 && probability <= 1, name, "'s threshold is a probability in (0, 1], not ", probability,
             ".");
  return -std::log(probability);
}

void set_ohem(const LossOptions& options, bool wide, LossArgs& args) {
  if (!options.ce || !options.ohem_threshold.has_value()) return;
  const double nll = nll_of(*options.ohem_threshold, "OHEM"), infinity = std::numeric_limits<double>::infinity();
  args.ohem = true;
  args.ohem_cutoff =
      wide ? std::nextafter(nll, infinity) : std::nextafter(static_cast<float>(nll), static_cast<float>(infinity));
  args.ohem_min_kept = options.ohem_min_kept;
}

void set_bcl(const LossOptions& options, LossArgs& args) {
  const IntList steps = options.bcl_steps;
  BCMF_CHECK(options.bcl_flipped.empty() || options.bcl_flipped.size() == 2, "BCL's flipped labels have two weights.");
  if (steps.empty()) return;
  BCMF_CHECK(steps.size() <= kMaxSteps && *std::min_element(steps.begin(), steps.end()) >= 1,
             "BCL takes 1 to 8 steps of at least one pixel, not ", words(steps), ".");
  BCMF_CHECK(options.bcl_nms_size >= 1 && options.bcl_nms_size % 2 == 1,
             "BCL's nms_size is an odd number of pixels, not ", options.bcl_nms_size, ".");
  args.bcl_steps = static_cast<int>(steps.size());
  // A side is shorter than 2^30, so that a longer step flips nothing, as one of 2^30 does.
  const auto bounded = [](int64_t pixels) { return static_cast<int>(std::min(pixels, int64_t{1} << 30)); };
  std::transform(steps.begin(), steps.end(), args.bcl_step, bounded);
  args.bcl_flipped = !options.bcl_flipped.empty();
  if (args.bcl_flipped) args.bcl_alpha = options.bcl_flipped[0], args.bcl_beta = options.bcl_flipped[1];
  args.bcl_weight = options.bcl_weight;
  args.bcl_cutoff = nll_of(options.bcl_threshold, "BCL");
  args.bcl_nms_radius = static_cast<int>(std::min(options.bcl_nms_size / 2, std::max(args.H, args.W)));
}

void set_cpg(const LossOptions& options, LossArgs& args) {
  if (options.cpg_kernel_size == 0) return;
  const int64_t size = options.cpg_kernel_size;
  BCMF_CHECK(size == 3 || size == 5 || size == 7, "CPG's kernel_size is 3, 5 or 7, not ", size, ".");
  args.cpg_radius = static_cast<int>(size / 2);
  args.cpg_window = options.cpg_window;
  args.cpg_weight = options.cpg_weight;
}

void set_options(const LossOptions& options, bool wide, LossArgs& args) {
  args.align_corners = options.align_corners;
  args.ignore_index = options.ignore_index;
  args.ce = options.ce;
  set_ohem(options, wide, args);
  set_bcl(options, args);
  set_cpg(options, args);
}

Tensor make_maps(int64_t maps, const LossArgs& args, const Kind& kind) {  // (maps, N, H, W)
  const int64_t map = args.H * args.W;
  return make_dense({maps, args.N, args.H, args.W}, {args.N * map, map, args.W, 1}, kind);
}

// The kernels read up to 16 bytes at once of what the forward has kept.
Tensor as_aligned(const Tensor& t) {
  const Tensor dense = as_contiguous(t);
  return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0 ? dense : stable::clone(dense);
}

}  // namespace

LossInputs::LossInputs(const LossOptions& options, const Tensor& logits, const Tensor& target,
                       const std::optional<Tensor>& weight)
    : args() {
  set_sizes(logits, target, args);
  args.logits = map_view(logits, "logits");
  args.labels = label_view(target);
  if (weight.has_value()) {
    BCMF_CHECK(weight->dim() == 1 && weight->size(0) == logits.size(1), "class weights have one entry for each of the ",
               logits.size(1), " classes, not ", words(weight->sizes()), ".");
    check_same_device(logits, *weight, "logits", "class weights");
    this->weight = as_contiguous(*weight, acc_type(logits));
    args.weight = this->weight->data_ptr();
  }
  set_options(options, args.logits.type == FloatType::f64, args);
  BCMF_CHECK(args.C <= kIgnoredId || (args.bcl_steps == 0 && args.cpg_radius == 0), "BCL and CPG take at most ",
             kIgnoredId, " classes, not ", args.C, ".");
}

LossSums::LossSums(const Tensor& logits, LossKept kept, LossArgs& args) {
  const Kind kind = acc_kind(logits);
  sums = empty({kSums}, kind.with(ScalarType::Double));
  cutoff = empty({}, kind);
  stats = make_maps(kept.stats_maps, args, kind);
  selected = empty({args.bcl_steps > 0 ? args.N : 0, args.H, args.W}, kind.with(ScalarType::Byte));
  marks = empty({kept.mark_bytes}, kind.with(ScalarType::Byte));
  args.sums = sums.mutable_data_ptr<double>();
  args.cutoff = cutoff.data_ptr();
  args.stats = stats.data_ptr();
  args.selected = selected.data_ptr();
  args.marks = marks.data_ptr();
  if (args.ohem) {
    nll = make_maps(1, args, kind);
    args.nll = nll.data_ptr();
  }
  if (args.N * args.H * args.W > 0) return;
  stable::zero_(sums);  // no kernel runs
  stable::zero_(cutoff);
}

LossTotal::LossTotal(const Tensor& cutoff, LossArgs& args) {
  const Kind kind = kind_of(cutoff);
  total = empty({}, kind);
  terms = empty({kTerms}, kind);
  summary = empty({kSummarySize}, kind);
  args.total = total.data_ptr();
  args.terms = terms.data_ptr();
  args.summary = summary.data_ptr();
}

LossFinish::LossFinish(const LossOptions& options, const Tensor& sums_, const Tensor& cutoff_) : args() {
  const ScalarType acc = cutoff_.scalar_type();
  BCMF_CHECK(has_sizes(sums_, {kSums}) && sums_.scalar_type() == ScalarType::Double && cutoff_.numel() == 1 &&
                 (acc == ScalarType::Float || acc == ScalarType::Double),
             "bcmf::loss_finish takes sums and cutoff as bcmf::loss_sums returned them.");
  check_same_device(sums_, cutoff_, "sums", "cutoff");
  sums = as_contiguous(sums_);
  cutoff = as_contiguous(cutoff_);
  args.sums = static_cast<double*>(sums.data_ptr());
  args.cutoff = cutoff.data_ptr();
  set_options(options, acc == ScalarType::Double, args);
}

LossGradient::LossGradient(const Tensor& grad_total_, const Tensor& logits, const Tensor& stats_,
                           const Tensor& selected_, const Tensor& marks_, const Tensor& summary_, LossKept kept,
                           LossArgs& args) {
  const ScalarType acc = acc_type(logits);
  const int64_t images = args.bcl_steps > 0 ? args.N : 0;
  BCMF_CHECK(grad_total_.numel() == 1 && has_sizes(summary_, {kSummarySize}) &&
                 has_sizes(stats_, {kept.stats_maps, args.N, args.H, args.W}) &&
                 has_sizes(selected_, {images, args.H, args.W}) && has_sizes(marks_, {kept.mark_bytes}) &&
                 stats_.scalar_type() == acc && summary_.scalar_type() == acc &&
                 selected_.scalar_type() == ScalarType::Byte && marks_.scalar_type() == ScalarType::Byte,
             "bcmf::loss_backward takes stats, selected, marks and summary as bcmf::loss returned them.");
  check_same_device(logits, grad_total_, "logits", "grad_total");
  check_same_device(logits, stats_, "logits", "stats");
  check_same_device(logits, selected_, "logits", "selected");
  check_same_device(logits, marks_, "logits", "marks");
  check_same_device(logits, summary_, "logits", "summary");
  grad_total = as_contiguous(grad_total_, acc);
  stats = as_aligned(stats_);
  selected = as_aligned(selected_);
  marks = as_aligned(marks_);
  summary = as_contiguous(summary_);
  grad = make_like(logits);
  args.grad_total = grad_total.data_ptr();
  args.stats = stats.data_ptr();
  args.selected = selected.data_ptr();
  args.marks = marks.data_ptr();
  args.summary = summary.data_ptr();
  args.grad = map_view(grad, "logits");
}

LossArgs upsample_args(const Tensor& logits, int64_t height, int64_t width, bool align_corners) {
  BCMF_CHECK(logits.dim() == 4 && logits.size(1) >= 1 && height >= 0 && width >= 0,
             "logits have the shape (N, C, h, w), not ", words(logits.sizes()), ".");
  LossArgs args = {};
  args.N = logits.size(0), args.C = logits.size(1), args.h = logits.size(2), args.w = logits.size(3);
  args.H = height, args.W = width;
  check_sides(args);
  BCMF_CHECK(logits.numel() > 0 || args.N == 0 || height * width == 0, "logits of the size ", words(logits.sizes()),
             " cannot be resampled to ", height, "x", width, ".");
  args.align_corners = align_corners;
  args.logits = map_view(logits, "logits");
  return args;
}

Tensor empty_classes(const Tensor& logits, const LossArgs& args) {
  return empty({args.N, args.H, args.W}, kind_of(logits).with(args.C <= 256 ? ScalarType::Byte : ScalarType::Int));
}

}  // namespace bcmf
