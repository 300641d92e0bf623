// Binds the kernels to torch.ops.bcmf (schemas and fake kernels stand in bcmf_ext/ops.py) and tells what was built.

#include <ATen/Functions.h>
#include <ATen/Version.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

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

struct Inputs {
  LossArgs args;
  std::optional<Tensor> weight;  // keeps the converted class weights alive
};

Inputs check_inputs(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
                    int64_t ignore_index) {
  TORCH_CHECK_VALUE(logits.dim() == 4 && logits.size(1) >= 2, "logits have the shape (N, C, H, W) with C >= 2, not ",
                    logits.sizes(), ".");
  TORCH_CHECK_VALUE(target.dim() == 3 && target.size(0) == logits.size(0) && target.size(1) == logits.size(2) &&
                        target.size(2) == logits.size(3),
                    "bcmf::loss reads logits of the target's size, not ", logits.sizes(), " for ", target.sizes(), ".");
  check_same_device(logits, target, "target");
  Inputs in = {};
  in.args.N = logits.size(0);
  in.args.C = logits.size(1);
  in.args.H = logits.size(2);
  in.args.W = logits.size(3);
  in.args.logits = logit_view(logits);
  in.args.labels = {target.data_ptr(), label_type(target.scalar_type()), target.stride(0), target.stride(1),
                    target.stride(2)};
  in.args.ignore_index = ignore_index;
  if (weight.has_value()) {
    TORCH_CHECK_VALUE(weight->dim() == 1 && weight->size(0) == logits.size(1),
                      "class weights have one entry for each of the ", logits.size(1), " classes, not ",
                      weight->sizes(), ".");
    check_same_device(logits, *weight, "class weights");
    in.weight = weight->to(acc_options(logits).dtype()).contiguous();
    in.args.weight = in.weight->data_ptr();
  }
  return in;
}

struct Outputs {
  Tensor total, stats, denominator;
};

Outputs allocate_outputs(const Tensor& logits, LossArgs& args) {
  const auto options = acc_options(logits);
  Outputs out = {at::empty({}, options), at::empty({2, args.N, args.H, args.W}, options), at::empty({}, options)};
  args.total = out.total.data_ptr();
  args.stats = out.stats.data_ptr();
  args.denominator = out.denominator.data_ptr();
  return out;
}

struct BackwardInputs {
  Inputs in;
  Tensor grad_total, stats, denominator, grad;
};

BackwardInputs check_backward_inputs(const Tensor& grad_total, const Tensor& logits, const Tensor& target,
                                     const std::optional<Tensor>& weight, const Tensor& stats,
                                     const Tensor& denominator, int64_t ignore_index) {
  BackwardInputs b = {check_inputs(logits, target, weight, ignore_index)};
  LossArgs& args = b.in.args;
  const auto acc = c10::typeMetaToScalarType(acc_options(logits).dtype());
  TORCH_CHECK_VALUE(grad_total.numel() == 1 && denominator.numel() == 1 && stats.dim() == 4 && stats.size(0) == 2 &&
                        stats.size(1) == args.N && stats.size(2) == args.H && stats.size(3) == args.W &&
                        stats.scalar_type() == acc && denominator.scalar_type() == acc,
                    "bcmf::loss_backward takes stats and denominator as bcmf::loss returned them.");
  check_same_device(logits, grad_total, "grad_total");
  check_same_device(logits, stats, "stats");
  check_same_device(logits, denominator, "denominator");
  b.grad_total = grad_total.to(acc).contiguous();
  b.stats = stats.contiguous();
  b.denominator = denominator.contiguous();
  b.grad = at::empty_like(logits, logits.options(), at::MemoryFormat::Preserve);
  args.grad_total = b.grad_total.data_ptr();
  args.stats = b.stats.data_ptr();
  args.denominator = b.denominator.data_ptr();
  args.grad = logit_view(b.grad);
  return b;
}

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
                                            const std::optional<Tensor>& weight, int64_t ignore_index) {
  Inputs in = check_inputs(logits, target, weight, ignore_index);
  Outputs out = allocate_outputs(logits, in.args);
  const int64_t bad_labels = cpu::loss_forward(in.args);
  TORCH_CHECK_VALUE(bad_labels == 0, describe_bad_labels(target, logits.size(1), ignore_index));
  return {out.total, out.stats, out.denominator};
}

Tensor loss_backward_cpu(const Tensor& grad_total, const Tensor& logits, const Tensor& target,
                         const std::optional<Tensor>& weight, const Tensor& stats, const Tensor& denominator,
                         int64_t ignore_index) {
  BackwardInputs b = check_backward_inputs(grad_total, logits, target, weight, stats, denominator, ignore_index);
  cpu::loss_backward(b.in.args);
  return b.grad;
}

#ifdef BCMF_WITH_CUDA
void check_launch(int error) {
  TORCH_CHECK(error == 0, "bcmf_ext: a CUDA kernel did not start (CUDA error ", error,
              "); python -m bcmf_ext.info says for which GPUs this build was made.");
}

std::tuple<Tensor, Tensor, Tensor> loss_cuda(const Tensor& logits, const Tensor& target,
                                             const std::optional<Tensor>& weight, int64_t ignore_index) {
  const c10::cuda::CUDAGuard guard(logits.device());
  Inputs in = check_inputs(logits, target, weight, ignore_index);
  Outputs out = allocate_outputs(logits, in.args);
  const Tensor scratch = at::empty({cuda::loss_scratch_size(in.args)}, logits.options().dtype(at::kDouble));
  check_launch(cuda::loss_forward(in.args, scratch.data_ptr<double>(), c10::cuda::getCurrentCUDAStream().stream()));
  return {out.total, out.stats, out.denominator};
}

Tensor loss_backward_cuda(const Tensor& grad_total, const Tensor& logits, const Tensor& target,
                          const std::optional<Tensor>& weight, const Tensor& stats, const Tensor& denominator,
                          int64_t ignore_index) {
  const c10::cuda::CUDAGuard guard(logits.device());
  BackwardInputs b = check_backward_inputs(grad_total, logits, target, weight, stats, denominator, ignore_index);
  check_launch(cuda::loss_backward(b.in.args, c10::cuda::getCurrentCUDAStream().stream()));
  return b.grad;
}
#endif

}  // namespace

TORCH_LIBRARY_IMPL(bcmf, CPU, m) {
  m.impl("loss", &loss_cpu);
  m.impl("loss_backward", &loss_backward_cpu);
}

#ifdef BCMF_WITH_CUDA
TORCH_LIBRARY_IMPL(bcmf, CUDA, m) {
  m.impl("loss", &loss_cuda);
  m.impl("loss_backward", &loss_backward_cuda);
}
#endif

}  // namespace bcmf

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
