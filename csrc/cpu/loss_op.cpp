// bcmf::loss, its parts, and the arg-max of resampled logits on the CPU (bcmf_ext/ops.py has the schemas).

#include <set>
#include <sstream>
#include <string>
#include <tuple>

#include "cpu/loss.h"
#include "loss_tensors.h"

namespace bcmf {
namespace {

// This is the sentence of Python's describe_bad_labels, so that all backends refuse labels in the same words.
std::string describe_bad_labels(const Tensor& target, int64_t num_classes, int64_t ignore_index) {
  const Tensor labels = as_contiguous(target, ScalarType::Long);
  std::set<int64_t> bad;
  for (int64_t i = 0; i < labels.numel(); ++i) {
    const int64_t label = labels.const_data_ptr<int64_t>()[i];
    if (classify_label(label, num_classes, ignore_index) == kBad) bad.insert(label);
  }
  if (bad.empty()) return "target held ids that are neither a class nor ignore_index; it has changed since.";
  std::ostringstream text;
  text << "target holds ";
  int shown = 0;
  for (const int64_t label : bad) {
    if (shown == 8) {
      text << ", …";
      break;
    }
    text << (shown++ ? ", " : "") << label;
  }
  text << ", but the logits have classes 0.." << num_classes - 1 << " and ignore_index is " << ignore_index;
  if (num_classes == 19 && *bad.rbegin() <= 33 && *bad.begin() >= -1)
    text << "; these look like Cityscapes label ids: map them to train ids";
  else if (bad.size() == 1 && *bad.begin() == 255)
    text << "; if 255 marks ignored pixels, pass ignore_index=255";
  text << ".";
  return text.str();
}

constexpr LossKept kKept = {/*stats_maps=*/2, /*mark_bytes=*/0};

LossSums sum_up(const Tensor& logits, LossInputs& in) {
  LossSums out(logits, kKept, in.args);
  if (out.stats.numel() > 0) cpu::loss_sums(in.args);
  return out;
}

LossResults loss(const LossOptions& options, const Tensor& logits, const Tensor& target,
                 const std::optional<Tensor>& weight) {
  LossInputs in(options, logits, target, weight);
  const LossSums sums = sum_up(logits, in);
  if (in.args.sums[kBadLabels] > 0)
    raise_value_error(describe_bad_labels(target, logits.size(1), options.ignore_index));
  const LossTotal out(sums.cutoff, in.args);
  cpu::loss_finish(in.args, float_type(acc_type(logits), "logits"));
  return as_results(sums, out);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss_sums(const LossOptions& options, const Tensor& logits,
                                                             const Tensor& target,
                                                             const std::optional<Tensor>& weight) {
  LossInputs in(options, logits, target, weight);
  return sum_up(logits, in).as_tuple();
}

std::tuple<Tensor, Tensor, Tensor> loss_finish(const LossOptions& options, const Tensor& sums, const Tensor& cutoff) {
  LossFinish in(options, sums, cutoff);
  const LossTotal out(in.cutoff, in.args);
  cpu::loss_finish(in.args, float_type(cutoff.scalar_type(), "cutoff"));
  return out.as_tuple();
}

Tensor loss_backward(const LossOptions& options, const Tensor& grad_total, const Tensor& logits, const Tensor& target,
                     const std::optional<Tensor>& weight, const Tensor& stats, const Tensor& selected,
                     const Tensor& marks, const Tensor& summary) {
  LossInputs in(options, logits, target, weight);
  LossGradient out(grad_total, logits, stats, selected, marks, summary, kKept, in.args);
  if (target.numel() == 0) return stable::zero_(out.grad);
  cpu::loss_backward(in.args);
  return out.grad;
}

Tensor upsample_argmax(const Tensor& logits, int64_t height, int64_t width, bool align_corners) {
  const LossArgs args = upsample_args(logits, height, width, align_corners);
  const Tensor classes = empty_classes(logits, args);
  if (classes.numel() > 0) cpu::upsample_argmax(args, classes.data_ptr(), nullptr);
  return classes;
}

std::tuple<Tensor, Tensor> upsample_confusion(const Tensor& logits, const Tensor& target, int64_t ignore_index,
                                              bool align_corners) {
  BCMF_CHECK(target.dim() == 3 && logits.dim() == 4 && target.size(0) == logits.size(0),
             "target has the shape (N, H, W) with the logits' N, not ", words(target.sizes()), ".");
  check_same_device(logits, target, "logits", "target");
  LossArgs args = upsample_args(logits, target.size(1), target.size(2), align_corners);
  args.labels = label_view(target);
  args.ignore_index = ignore_index;
  const Tensor classes = empty_classes(logits, args);
  const Tensor bins = zeros({args.C * args.C + 2}, kind_of(logits).with(ScalarType::Long));
  if (classes.numel() > 0) cpu::upsample_argmax(args, classes.data_ptr(), bins.mutable_data_ptr<int64_t>());
  return {classes, bins};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bcmf, CPU, m) {
  m.impl("loss", TORCH_BOX(&WithOptions<&loss>::call));
  m.impl("loss_sums", TORCH_BOX(&WithOptions<&loss_sums>::call));
  m.impl("loss_finish", TORCH_BOX(&WithOptions<&loss_finish>::call));
  m.impl("loss_backward", TORCH_BOX(&WithOptions<&loss_backward>::call));
  m.impl("upsample_argmax", TORCH_BOX(&upsample_argmax));
  m.impl("upsample_confusion", TORCH_BOX(&upsample_confusion));
}

}  // namespace bcmf
