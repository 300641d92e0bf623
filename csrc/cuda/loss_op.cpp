// bcmf::loss, its parts, and the arg-max of resampled logits on CUDA (bcmf_ext/ops.py has the schemas).

#include <tuple>

#include "cuda/device.h"
#include "cuda/library.h"
#include "cuda/loss.h"
#include "loss_tensors.h"

namespace bcmf {
namespace {

LossKept kept(const LossArgs& args) { return {cuda::loss_stats_maps(args), cuda::loss_mark_bytes(args)}; }

LossSums sum_up(const Tensor& logits, LossInputs& in) {
  LossSums out(logits, kept(in.args), in.args);
  if (out.stats.numel() == 0) return out;
  const Tensor scratch = cuda::make_scratch(logits, cuda::loss_sums_scratch(in.args));
  cuda::check_launch(cuda::loss_sums(in.args, scratch.data_ptr(), cuda::current_stream(logits)));
  return out;
}

LossTotal finish(const Tensor& cutoff, LossArgs& args) {
  const LossTotal out(cutoff, args);
  cuda::check_launch(cuda::loss_finish(args, float_type(cutoff.scalar_type(), "cutoff"), cuda::current_stream(cutoff)));
  return out;
}

LossResults loss(const LossOptions& options, const Tensor& logits, const Tensor& target,
                 const std::optional<Tensor>& weight) {
  const cuda::Guard guard(logits);
  LossInputs in(options, logits, target, weight);
  const LossSums sums = sum_up(logits, in);
  return as_results(sums, finish(sums.cutoff, in.args));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss_sums(const LossOptions& options, const Tensor& logits,
                                                             const Tensor& target,
                                                             const std::optional<Tensor>& weight) {
  const cuda::Guard guard(logits);
  LossInputs in(options, logits, target, weight);
  return sum_up(logits, in).as_tuple();
}

std::tuple<Tensor, Tensor, Tensor> loss_finish(const LossOptions& options, const Tensor& sums, const Tensor& cutoff) {
  const cuda::Guard guard(sums);
  LossFinish in(options, sums, cutoff);
  return finish(in.cutoff, in.args).as_tuple();
}

Tensor loss_backward(const LossOptions& options, const Tensor& grad_total, const Tensor& logits, const Tensor& target,
                     const std::optional<Tensor>& weight, const Tensor& stats, const Tensor& selected,
                     const Tensor& marks, const Tensor& summary) {
  const cuda::Guard guard(logits);
  LossInputs in(options, logits, target, weight);
  LossGradient out(grad_total, logits, stats, selected, marks, summary, kept(in.args), in.args);
  if (target.numel() == 0) return stable::zero_(out.grad);
  BCMF_CHECK(
      cuda::loss_backward_fits(in.args), "the gradient of CPG with kernel_size=", 2 * in.args.cpg_radius + 1,
      " for fp64 logits takes more shared memory than this GPU gives a block: use impl='triton', or fp32 logits.");
  const Tensor scratch = cuda::make_scratch(logits, cuda::loss_backward_scratch(in.args));
  cuda::check_launch(cuda::loss_backward(in.args, scratch.data_ptr(), cuda::current_stream(logits)));
  return out.grad;
}

Tensor upsample_argmax(const Tensor& logits, int64_t height, int64_t width, bool align_corners) {
  const cuda::Guard guard(logits);
  const LossArgs args = upsample_args(logits, height, width, align_corners);
  const Tensor classes = empty_classes(logits, args);
  if (classes.numel() > 0)
    cuda::check_launch(cuda::upsample_argmax(args, classes.data_ptr(), cuda::current_stream(logits)));
  return classes;
}

}  // namespace

BCMF_CUDA_LIBRARY(m) {
  m.impl("loss", TORCH_BOX(&WithOptions<&loss>::call));
  m.impl("loss_sums", TORCH_BOX(&WithOptions<&loss_sums>::call));
  m.impl("loss_finish", TORCH_BOX(&WithOptions<&loss_finish>::call));
  m.impl("loss_backward", TORCH_BOX(&WithOptions<&loss_backward>::call));
  m.impl("upsample_argmax", TORCH_BOX(&upsample_argmax));
}

}  // namespace bcmf
