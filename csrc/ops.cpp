// Binds the kernels to torch.ops.bcmf (schemas and fake kernels stand in bcmf_ext/ops.py) and tells what was built.

#include <ATen/Functions.h>
#include <ATen/Version.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include <cmath>
#include <limits>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <tuple>

#include "cpu/loss.h"
#ifdef BCMF_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/loss.h"
#endif

namespace bcmf {
namespace {

using at::Tensor;

LogitType logit_type(at::ScalarType type) {
  switch (type) {
    case at::kHalf:
      return LogitType::f16;
    case at::kBFloat16:
      return LogitType::bf16;
    case at::kFloat:
      return LogitType::f32;
    case at::kDouble:
      return LogitType::f64;
    default:
      TORCH_CHECK_TYPE(false, "logits are floating point (fp16, bf16, fp32, fp64), not ", type, ".");
  }
}

LabelType label_type(at::ScalarType type) {
  switch (type) {
    case at::kByte:
      return LabelType::u8;
    case at::kShort:
      return LabelType::i16;
    case at::kInt:
      return LabelType::i32;
    case at::kLong:
      return LabelType::i64;
    default:
      TORCH_CHECK_TYPE(false, "target holds class ids (uint8, int16, int32 or int64), not ", type, ".");
  }
}

at::TensorOptions acc_options(const Tensor& logits) {
  return logits.options().dtype(logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

LogitView logit_view(const Tensor& t) {
  return {t.data_ptr(), logit_type(t.scalar_type()), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// The Python functions have checked all this with kinder words; these keep a direct call of torch.ops.bcmf memory-safe.
void check_same_device(const Tensor& logits, const Tensor& other, const char* name) {
  TORCH_CHECK_VALUE(other.device() == logits.device(), "logits are on ", logits.device(), " and ", name, " on ",
                    other.device(), ".");
}

// Both ops' arguments beside tensors of their own: the schemas stand in bcmf_ext/ops.py.
struct LossInputs {
  LossArgs args;
  std::optional<Tensor> weight;  // keeps the converted class weights alive

  LossInputs(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight, int64_t ignore_index,
             std::optional<double> ohem_threshold, int64_t ohem_min_kept);
};

LossInputs::LossInputs(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
                       int64_t ignore_index, std::optional<double> ohem_threshold, int64_t ohem_min_kept)
    : args() {
  TORCH_CHECK_VALUE(logits.dim() == 4 && logits.size(1) >= 2, "logits have the shape (N, C, H, W) with C >= 2, not ",
                    logits.sizes(), ".");
  TORCH_CHECK_VALUE(target.dim() == 3 && target.size(0) == logits.size(0) && target.size(1) == logits.size(2) &&
                        target.size(2) == logits.size(3),
                    "bcmf::loss reads logits of the target's size, not ", logits.sizes(), " for ", target.sizes(), ".");
  check_same_device(logits, target, "target");
  args.N = logits.size(0);
  args.C = logits.size(1);
  args.H = logits.size(2);
  args.W = logits.size(3);
  args.logits = logit_view(logits);
  args.labels = {target.data_ptr(), label_type(target.scalar_type()), target.stride(0), target.stride(1),
                 target.stride(2)};
  args.ignore_index = ignore_index;
  if (weight.has_value()) {
    TORCH_CHECK_VALUE(weight->dim() == 1 && weight->size(0) == logits.size(1),
                      "class weights have one entry for each of the ", logits.size(1), " classes, not ",
                      weight->sizes(), ".");
    check_same_device(logits, *weight, "class weights");
    this->weight = weight->to(acc_options(logits).dtype()).contiguous();
    args.weight = this->weight->data_ptr();
  }
  if (ohem_threshold.has_value()) {
    TORCH_CHECK_VALUE(*ohem_threshold > 0 && *ohem_threshold <= 1, "OHEM's threshold is a probability in (0, 1], not ",
                      *ohem_threshold, ".");
    const double nll = -std::log(*ohem_threshold), infinity = std::numeric_limits<double>::infinity();
    args.ohem = true;
    args.ohem_cutoff = logits.scalar_type() == at::kDouble
                           ? std::nextafter(nll, infinity)
                           : std::nextafter(static_cast<float>(nll), static_cast<float>(infinity));
    args.ohem_min_kept = ohem_min_kept;
  }
}

struct LossOutputs {
  Tensor total, stats, summary, nll;

  LossOutputs(const Tensor& logits, LossArgs& args) {
    const auto options = acc_options(logits);
    total = at::empty({}, options);
    stats = at::empty({2, args.N, args.H, args.W}, options);
    summary = at::empty({kSummarySize}, options);
    args.total = total.data_ptr();
    args.stats = stats.data_ptr();
    args.summary = summary.data_ptr();
    if (args.ohem) {
      nll = at::empty({args.N, args.H, args.W}, options);
      args.nll = nll.data_ptr();
    }
  }
};

// What the backward op takes and returns beside its inputs.
struct LossGradient {
  Tensor grad_total, stats, summary, grad;

  LossGradient(const Tensor& grad_total_, const Tensor& logits, const Tensor& stats_, const Tensor& summary_,
               LossArgs& args) {
    const auto acc = c10::typeMetaToScalarType(acc_options(logits).dtype());
    TORCH_CHECK_VALUE(grad_total_.numel() == 1 && summary_.dim() == 1 && summary_.size(0) == kSummarySize &&
                          stats_.dim() == 4 && stats_.size(0) == 2 && stats_.size(1) == args.N &&
                          stats_.size(2) == args.H && stats_.size(3) == args.W && stats_.scalar_type() == acc &&
                          summary_.scalar_type() == acc,
                      "bcmf::loss_backward takes stats and summary as bcmf::loss returned them.");
    check_same_device(logits, grad_total_, "grad_total");
    check_same_device(logits, stats_, "stats");
    check_same_device(logits, summary_, "summary");
    grad_total = grad_total_.to(acc).contiguous();
    stats = stats_.contiguous();
    summary = summary_.contiguous();
    grad = at::empty_like(logits, logits.options(), at::MemoryFormat::Preserve);
    args.grad_total = grad_total.data_ptr();
    args.stats = stats.data_ptr();
    args.summary = summary.data_ptr();
    args.grad = logit_view(grad);
  }
};

#ifndef BCMF_EMULATED
// Same sentence as bcmf_ext.reference.describe_bad_labels.
std::string describe_bad_labels(const Tensor& target, int64_t num_classes, int64_t ignore_index) {
  const Tensor labels = target.to(at::kLong).contiguous();
  std::set<int64_t> bad;
  for (int64_t i = 0; i < labels.numel(); ++i) {
    const int64_t label = labels.const_data_ptr<int64_t>()[i];
    if (classify_label(label, num_classes, ignore_index) == kBad) bad.insert(label);
  }
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

std::tuple<Tensor, Tensor, Tensor> loss_cpu(const Tensor& logits, const Tensor& target,
                                            const std::optional<Tensor>& weight, int64_t ignore_index,
                                            std::optional<double> ohem_threshold, int64_t ohem_min_kept) {
  LossInputs in(logits, target, weight, ignore_index, ohem_threshold, ohem_min_kept);
  LossOutputs out(logits, in.args);
  const int64_t bad_labels = cpu::loss_forward(in.args);
  TORCH_CHECK_VALUE(bad_labels == 0, describe_bad_labels(target, logits.size(1), ignore_index));
  return {out.total, out.stats, out.summary};
}

Tensor loss_backward_cpu(const Tensor& grad_total, const Tensor& logits, const Tensor& target,
                         const std::optional<Tensor>& weight, const Tensor& stats, const Tensor& summary,
                         int64_t ignore_index, std::optional<double> ohem_threshold, int64_t ohem_min_kept) {
  LossInputs in(logits, target, weight, ignore_index, ohem_threshold, ohem_min_kept);
  const LossGradient out(grad_total, logits, stats, summary, in.args);
  cpu::loss_backward(in.args);
  return out.grad;
}
#endif

#ifdef BCMF_WITH_CUDA
void check_launch(int error) {
  TORCH_CHECK(error == 0, "bcmf_ext: a CUDA kernel did not start (CUDA error ", error,
              "); python -m bcmf_ext.info says for which GPUs this build was made.");
}

std::tuple<Tensor, Tensor, Tensor> loss_cuda(const Tensor& logits, const Tensor& target,
                                             const std::optional<Tensor>& weight, int64_t ignore_index,
                                             std::optional<double> ohem_threshold, int64_t ohem_min_kept) {
  const c10::cuda::CUDAGuard guard(logits.device());
  LossInputs in(logits, target, weight, ignore_index, ohem_threshold, ohem_min_kept);
  LossOutputs out(logits, in.args);
  const Tensor scratch = at::empty({cuda::loss_scratch_bytes(in.args)}, logits.options().dtype(at::kByte));
  check_launch(cuda::loss_forward(in.args, scratch.data_ptr(), c10::cuda::getCurrentCUDAStream().stream()));
  return {out.total, out.stats, out.summary};
}

Tensor loss_backward_cuda(const Tensor& grad_total, const Tensor& logits, const Tensor& target,
                          const std::optional<Tensor>& weight, const Tensor& stats, const Tensor& summary,
                          int64_t ignore_index, std::optional<double> ohem_threshold, int64_t ohem_min_kept) {
  const c10::cuda::CUDAGuard guard(logits.device());
  LossInputs in(logits, target, weight, ignore_index, ohem_threshold, ohem_min_kept);
  const LossGradient out(grad_total, logits, stats, summary, in.args);
  check_launch(cuda::loss_backward(in.args, c10::cuda::getCurrentCUDAStream().stream()));
  return out.grad;
}

void register_cuda(torch::Library& m) {
  m.impl("loss", &loss_cuda);
  m.impl("loss_backward", &loss_backward_cuda);
}
#endif

}  // namespace

#ifdef BCMF_EMULATED  // by python_tests/emulator: the CUDA kernels, run on CPU tensors, under another name
TORCH_LIBRARY_IMPL(bcmf_emulated, CPU, m) { register_cuda(m); }
#else
TORCH_LIBRARY_IMPL(bcmf, CPU, m) {
  m.impl("loss", &loss_cpu);
  m.impl("loss_backward", &loss_backward_cpu);
}
#ifdef BCMF_WITH_CUDA
TORCH_LIBRARY_IMPL(bcmf, CUDA, m) { register_cuda(m); }
#endif
#endif

}  // namespace bcmf

#ifndef BCMF_EMULATED
PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled kernels of bcmf_ext; importing it registers them with torch.ops.bcmf.";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["torch"] = TORCH_VERSION;
        info["compiler"] = __VERSION__;
        info["cuda_archs"] = BCMF_CUDA_ARCHS;  // "" without CUDA
        info["cpu_capability"] = bcmf::cpu::loss_capability();
        return info;
      },
      "What was compiled: torch, compiler, cuda_archs (TORCH_CUDA_ARCH_LIST form, empty without CUDA); and the CPU "
      "instruction set in use.");
}
#endif
