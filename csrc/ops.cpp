// Binds the kernels to torch.ops.bcmf (schemas and fake kernels stand in bcmf_ext/ops.py) and tells what was built.

#include <ATen/EmptyTensor.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/loss.h"
#include "cpu/memory.h"
#include "ops.h"
#ifdef BCMF_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/loss.h"
#endif

namespace bcmf {
namespace {

using at::Tensor;

at::TensorOptions acc_options(const Tensor& logits) { return logits.options().dtype(acc_type(logits)); }

LabelView label_view(const Tensor& t) {
  return {t.data_ptr(), label_type(t.scalar_type(), "target"), t.stride(0), t.stride(1), t.stride(2)};
}

// The options of bcmf::loss, in the order of the schemas in bcmf_ext/ops.py (contract() below lets a test compare
// them). BCMF_LOSS_PARAMETERS declares them as parameters, BCMF_LOSS_ARGUMENTS passes them on.
#define BCMF_LOSS_OPTIONS(option)                                                                                   \
  option(int64_t, ignore_index), option(bool, align_corners), option(bool, ce),                                     \
      option(std::optional<double>, ohem_threshold), option(int64_t, ohem_min_kept), option(double, bcl_weight),    \
      option(at::IntArrayRef, bcl_steps), option(at::ArrayRef<double>, bcl_flipped), option(double, bcl_threshold), \
      option(int64_t, bcl_nms_size), option(double, cpg_weight), option(int64_t, cpg_kernel_size),                  \
      option(bool, cpg_window)
#define BCMF_PARAMETER(type, name) type name
#define BCMF_ARGUMENT(type, name) name
#define BCMF_OPTION_NAME(type, name) #name
#define BCMF_LOSS_PARAMETERS BCMF_LOSS_OPTIONS(BCMF_PARAMETER)
#define BCMF_LOSS_ARGUMENTS BCMF_LOSS_OPTIONS(BCMF_ARGUMENT)

void check_sides(const LossArgs& args) {
  for (const int64_t side : {args.C, args.h, args.w, args.H, args.W}) check_side(side);
}

// The arguments that bcmf::loss and bcmf::loss_backward have in common, checked, and as the kernels take them.
struct LossInputs {
  LossArgs args;
  std::optional<Tensor> weight;  // the converted class weights; keeps args.weight alive

  LossInputs(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight, BCMF_LOSS_PARAMETERS);
};

LossInputs::LossInputs(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
                       BCMF_LOSS_PARAMETERS)
    : args() {
  TORCH_CHECK_VALUE(logits.dim() == 4 && logits.size(1) >= 2, "logits have the shape (N, C, h, w) with C >= 2, not ",
                    logits.sizes(), ".");
  TORCH_CHECK_VALUE(target.dim() == 3 && target.size(0) == logits.size(0),
                    "target has the shape (N, H, W) with the "
                    "logits' N = ",
                    logits.size(0), ", not ", target.sizes(), ".");
  check_same_device(logits, target, "logits", "target");
  args.N = logits.size(0);
  args.C = logits.size(1);
  args.h = logits.size(2);
  args.w = logits.size(3);
  args.H = target.size(1);
  args.W = target.size(2);
  TORCH_CHECK_VALUE(target.numel() == 0 || logits.numel() > 0, "logits of the size ", logits.sizes(),
                    " cannot be resampled to ", target.sizes(), ".");
  check_sides(args);
  args.align_corners = align_corners;
  args.logits = map_view(logits, "logits");
  args.labels = label_view(target);
  args.ignore_index = ignore_index;
  if (weight.has_value()) {
    TORCH_CHECK_VALUE(weight->dim() == 1 && weight->size(0) == logits.size(1),
                      "class weights have one entry for each of the ", logits.size(1), " classes, not ",
                      weight->sizes(), ".");
    check_same_device(logits, *weight, "logits", "class weights");
    this->weight = weight->to(acc_options(logits).dtype()).contiguous();
    args.weight = this->weight->data_ptr();
  }
  args.ce = ce;
  const auto nll_of = [](double probability, const char* name) {
    TORCH_CHECK_VALUE(probability > 0 && probability <= 1, name, "'s threshold is a probability in (0, 1], not ",
                      probability, ".");
    return -std::log(probability);
  };
  const bool wide = logits.scalar_type() == at::kDouble;
  if (ohem_threshold.has_value()) {
    const double nll = nll_of(*ohem_threshold, "OHEM"), infinity = std::numeric_limits<double>::infinity();
    args.ohem = true;
    args.ohem_cutoff =
        wide ? std::nextafter(nll, infinity) : std::nextafter(static_cast<float>(nll), static_cast<float>(infinity));
    args.ohem_min_kept = ohem_min_kept;
  }
  if (!bcl_steps.empty()) {
    TORCH_CHECK_VALUE(bcl_steps.size() <= kMaxSteps && *std::min_element(bcl_steps.begin(), bcl_steps.end()) >= 1,
                      "BCL takes 1 to 8 steps of at least one pixel, not ", bcl_steps, ".");
    TORCH_CHECK_VALUE(bcl_flipped.empty() || bcl_flipped.size() == 2, "BCL's flipped labels have two weights.");
    TORCH_CHECK_VALUE(bcl_nms_size >= 1 && bcl_nms_size % 2 == 1, "BCL's nms_size is an odd number of pixels, not ",
                      bcl_nms_size, ".");
    args.bcl_steps = static_cast<int>(bcl_steps.size());
    // A side is shorter than 2^30, so that a longer step flips nothing, as one of 2^30 does.
    const auto bounded = [](int64_t pixels) { return static_cast<int>(std::min(pixels, int64_t{1} << 30)); };
    std::transform(bcl_steps.begin(), bcl_steps.end(), args.bcl_step, bounded);
    args.bcl_flipped = !bcl_flipped.empty();
    if (args.bcl_flipped) args.bcl_alpha = bcl_flipped[0], args.bcl_beta = bcl_flipped[1];
    args.bcl_weight = bcl_weight;
    args.bcl_cutoff = nll_of(bcl_threshold, "BCL");
    args.bcl_nms_radius = static_cast<int>(std::min(bcl_nms_size / 2, std::max(args.H, args.W)));
  }
  if (cpg_kernel_size != 0) {
    TORCH_CHECK_VALUE(cpg_kernel_size == 3 || cpg_kernel_size == 5 || cpg_kernel_size == 7,
                      "CPG's kernel_size is 3, 5 or 7, not ", cpg_kernel_size, ".");
    args.cpg_radius = static_cast<int>(cpg_kernel_size / 2);
    args.cpg_window = cpg_window;
    args.cpg_weight = cpg_weight;
  }
  TORCH_CHECK_VALUE(args.C <= kIgnoredId || (args.bcl_steps == 0 && args.cpg_radius == 0), "BCL and CPG take at most ",
                    kIgnoredId, " classes, not ", args.C, ".");
}

// Makes a tensor that every training step makes anew. On the CPU, a large one lies in memory that is kept from step to
// step (cpu/memory.h).
Tensor make_tensor(at::IntArrayRef sizes, at::IntArrayRef strides, const at::TensorOptions& options) {
#ifndef BCMF_EMULATED
  const size_t bytes = at::detail::computeStorageNbytes(sizes, strides, options.dtype().itemsize());
  if (options.device().is_cpu() && bytes >= cpu::kLarge)
    return at::from_blob(cpu::allocate_large(bytes), sizes, strides, cpu::free_large, options);
#endif
  return at::empty_strided(sizes, strides, options);
}

Tensor make_maps(int64_t maps, const LossArgs& args, const at::TensorOptions& options) {  // (maps, N, H, W)
  const int64_t map = args.H * args.W;
  return make_tensor({maps, args.N, args.H, args.W}, {args.N * map, map, args.W, 1}, options);
}

Tensor make_like(const Tensor& t) {  // with the strides that empty_like would choose
  const Tensor like = at::empty_like(t, t.options().device(at::kMeta), at::MemoryFormat::Preserve);
  return make_tensor(t.sizes(), like.strides(), t.options());
}

struct LossOutputs {
  Tensor total, terms, stats, selected, summary, nll;

  LossOutputs(const Tensor& logits, LossArgs& args) {
    const auto options = acc_options(logits);
    total = at::empty({}, options);
    terms = at::empty({kTerms}, options);
    stats = make_maps(2, args, options);
    summary = at::empty({kSummarySize}, options);
    selected = at::empty({args.bcl_steps > 0 ? args.N : 0, args.H, args.W}, options.dtype(at::kByte));
    args.total = total.data_ptr();
    args.terms = terms.data_ptr();
    args.stats = stats.data_ptr();
    args.selected = selected.data_ptr();
    args.summary = summary.data_ptr();
    if (args.ohem) {
      nll = make_maps(1, args, options);
      args.nll = nll.data_ptr();
    }
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> as_tuple() const {
    return {total, terms, stats, selected, summary};
  }
  // Without any pixel, every term is exactly 0.
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> as_zeros() const {
    for (const Tensor& t : {total, terms, summary}) t.zero_();
    return as_tuple();
  }
};

// The tensors that bcmf::loss_backward takes beside those of LossInputs, checked, and the gradient that it returns.
struct LossGradient {
  Tensor grad_total, stats, selected, summary, grad;

  LossGradient(const Tensor& grad_total_, const Tensor& logits, const Tensor& stats_, const Tensor& selected_,
               const Tensor& summary_, LossArgs& args) {
    const auto acc = c10::typeMetaToScalarType(acc_options(logits).dtype());
    const int64_t images = args.bcl_steps > 0 ? args.N : 0;
    TORCH_CHECK_VALUE(grad_total_.numel() == 1 && summary_.sizes() == at::IntArrayRef({kSummarySize}) &&
                          stats_.sizes() == at::IntArrayRef({2, args.N, args.H, args.W}) &&
                          selected_.sizes() == at::IntArrayRef({images, args.H, args.W}) &&
                          stats_.scalar_type() == acc && summary_.scalar_type() == acc &&
                          selected_.scalar_type() == at::kByte,
                      "bcmf::loss_backward takes stats, selected and summary as bcmf::loss returned them.");
    check_same_device(logits, grad_total_, "logits", "grad_total");
    check_same_device(logits, stats_, "logits", "stats");
    check_same_device(logits, selected_, "logits", "selected");
    check_same_device(logits, summary_, "logits", "summary");
    grad_total = grad_total_.to(acc).contiguous();
    stats = stats_.contiguous();
    // The kernels read 16 bytes of stats at once.
    if (reinterpret_cast<uintptr_t>(stats.const_data_ptr()) % 16 != 0) stats = stats.clone();
    selected = selected_.contiguous();
    summary = summary_.contiguous();
    grad = make_like(logits);
    args.grad_total = grad_total.data_ptr();
    args.stats = stats.data_ptr();
    args.selected = selected.data_ptr();
    args.summary = summary.data_ptr();
    args.grad = map_view(grad, "logits");
  }
};

// The arguments of an arg-max of logits that are resampled to (height, width): only sizes and logits are filled in.
LossArgs upsample_args(const Tensor& logits, int64_t height, int64_t width, bool align_corners) {
  TORCH_CHECK_VALUE(logits.dim() == 4 && logits.size(1) >= 1 && height >= 0 && width >= 0,
                    "logits have the shape (N, C, h, w), not ", logits.sizes(), ".");
  LossArgs args = {};
  args.N = logits.size(0), args.C = logits.size(1), args.h = logits.size(2), args.w = logits.size(3);
  args.H = height, args.W = width;
  check_sides(args);
  TORCH_CHECK_VALUE(logits.numel() > 0 || args.N == 0 || height * width == 0, "logits of the size ", logits.sizes(),
                    " cannot be resampled to ", height, "x", width, ".");
  args.align_corners = align_corners;
  args.logits = map_view(logits, "logits");
  return args;
}

Tensor empty_classes(const Tensor& logits, const LossArgs& args) {
  return at::empty({args.N, args.H, args.W}, logits.options().dtype(args.C <= 256 ? at::kByte : at::kInt));
}

#ifndef BCMF_EMULATED
// This is the sentence of Python's describe_bad_labels, so that all backends refuse labels in the same words.
std::string describe_bad_labels(const Tensor& target, int64_t num_classes, int64_t ignore_index) {
  const Tensor labels = target.to(at::kLong).contiguous();
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss_cpu(const Tensor& logits, const Tensor& target,
                                                            const std::optional<Tensor>& weight, BCMF_LOSS_PARAMETERS) {
  LossInputs in(logits, target, weight, BCMF_LOSS_ARGUMENTS);
  LossOutputs out(logits, in.args);
  if (target.numel() == 0) return out.as_zeros();
  const int64_t bad_labels = cpu::loss_forward(in.args);
  TORCH_CHECK_VALUE(bad_labels == 0, describe_bad_labels(target, logits.size(1), ignore_index));
  return out.as_tuple();
}

Tensor loss_backward_cpu(const Tensor& grad_total, const Tensor& logits, const Tensor& target,
                         const std::optional<Tensor>& weight, const Tensor& stats, const Tensor& selected,
                         const Tensor& summary, BCMF_LOSS_PARAMETERS) {
  LossInputs in(logits, target, weight, BCMF_LOSS_ARGUMENTS);
  const LossGradient out(grad_total, logits, stats, selected, summary, in.args);
  if (target.numel() == 0) return out.grad.zero_();
  cpu::loss_backward(in.args);
  return out.grad;
}

Tensor upsample_argmax_cpu(const Tensor& logits, int64_t height, int64_t width, bool align_corners) {
  const LossArgs args = upsample_args(logits, height, width, align_corners);
  const Tensor classes = empty_classes(logits, args);
  if (classes.numel() > 0) cpu::upsample_argmax(args, classes.data_ptr(), nullptr);
  return classes;
}

std::tuple<Tensor, Tensor> upsample_confusion_cpu(const Tensor& logits, const Tensor& target, int64_t ignore_index,
                                                  bool align_corners) {
  TORCH_CHECK_VALUE(target.dim() == 3 && logits.dim() == 4 && target.size(0) == logits.size(0),
                    "target has the shape (N, H, W) with the logits' N, not ", target.sizes(), ".");
  check_same_device(logits, target, "logits", "target");
  LossArgs args = upsample_args(logits, target.size(1), target.size(2), align_corners);
  args.labels = label_view(target);
  args.ignore_index = ignore_index;
  const Tensor classes = empty_classes(logits, args);
  const Tensor bins = at::zeros({args.C * args.C + 2}, logits.options().dtype(at::kLong));
  if (classes.numel() > 0) cpu::upsample_argmax(args, classes.data_ptr(), bins.mutable_data_ptr<int64_t>());
  return {classes, bins};
}
#endif

#ifdef BCMF_WITH_CUDA
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss_cuda(const Tensor& logits, const Tensor& target,
                                                             const std::optional<Tensor>& weight,
                                                             BCMF_LOSS_PARAMETERS) {
  const c10::cuda::CUDAGuard guard(logits.device());
  LossInputs in(logits, target, weight, BCMF_LOSS_ARGUMENTS);
  LossOutputs out(logits, in.args);
  if (target.numel() == 0) return out.as_zeros();
  const Tensor scratch = make_scratch(logits, cuda::loss_forward_scratch(in.args));
  check_launch(cuda::loss_forward(in.args, scratch.data_ptr(), c10::cuda::getCurrentCUDAStream().stream()));
  return out.as_tuple();
}

Tensor loss_backward_cuda(const Tensor& grad_total, const Tensor& logits, const Tensor& target,
                          const std::optional<Tensor>& weight, const Tensor& stats, const Tensor& selected,
                          const Tensor& summary, BCMF_LOSS_PARAMETERS) {
  const c10::cuda::CUDAGuard guard(logits.device());
  LossInputs in(logits, target, weight, BCMF_LOSS_ARGUMENTS);
  const LossGradient out(grad_total, logits, stats, selected, summary, in.args);
  if (target.numel() == 0) return out.grad.zero_();
  const Tensor scratch = make_scratch(logits, cuda::loss_backward_scratch(in.args));
  check_launch(cuda::loss_backward(in.args, scratch.data_ptr(), c10::cuda::getCurrentCUDAStream().stream()));
  return out.grad;
}

Tensor upsample_argmax_cuda(const Tensor& logits, int64_t height, int64_t width, bool align_corners) {
  const c10::cuda::CUDAGuard guard(logits.device());
  const LossArgs args = upsample_args(logits, height, width, align_corners);
  const Tensor classes = empty_classes(logits, args);
  if (classes.numel() == 0) return classes;
  check_launch(cuda::upsample_argmax(args, classes.data_ptr(), c10::cuda::getCurrentCUDAStream().stream()));
  return classes;
}

void register_cuda(torch::Library& m) {
  m.impl("loss", &loss_cuda);
  m.impl("loss_backward", &loss_backward_cuda);
  m.impl("upsample_argmax", &upsample_argmax_cuda);
  register_lmfm_cuda(m);
}
#endif

}  // namespace

#ifdef BCMF_WITH_CUDA
void check_launch(int error) {
  TORCH_CHECK(error == 0, "bcmf_ext: a CUDA kernel did not start (", cuda::error_text(error),
              "); python -m bcmf_ext.info says for which GPUs this build was made.");
}
#endif

#ifdef BCMF_EMULATED  // python_tests/harness/emulator runs the CUDA kernels on CPU tensors, under another name
TORCH_LIBRARY_IMPL(bcmf_emulated, CPU, m) { register_cuda(m); }
#else
TORCH_LIBRARY_IMPL(bcmf, CPU, m) {
  m.impl("loss", &loss_cpu);
  m.impl("loss_backward", &loss_backward_cpu);
  m.impl("upsample_argmax", &upsample_argmax_cpu);
  m.impl("upsample_confusion", &upsample_confusion_cpu);
  register_lmfm_cpu(m);
  register_metrics_cpu(m);
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
        info["cpu_capability"] = bcmf::cpu::isa().name;
        return info;
      },
      "What was compiled: torch, compiler, cuda_archs (TORCH_CUDA_ARCH_LIST form, empty without CUDA); and the CPU "
      "instruction set in use.");
  m.def(
      "contract",
      [] {
        const auto names = [](const std::vector<std::string>& list) { return pybind11::tuple(pybind11::cast(list)); };
        pybind11::dict contract;
        contract["SUMMARY"] = names({BCMF_SUMMARY(BCMF_ENTRY_NAME) "selected"});
        contract["TERMS"] = names({BCMF_TERMS(BCMF_ENTRY_NAME)});
        contract["MAX_STEPS"] = bcmf::kMaxSteps;
        contract["LOSS_OPTIONS"] = names({BCMF_LOSS_OPTIONS(BCMF_OPTION_NAME)});
        return contract;
      },
      "What bcmf_ext/ops.py and the compiled kernels have to agree on, in this order: the entries of bcmf::loss's "
      "summary, of which the last one, 'selected', has MAX_STEPS places, its terms, and its options.");
  m.def("release_kept_memory", &bcmf::cpu::release_kept_memory,
        "Gives the system the memory that the CPU kernels keep from step to step (large gradients and statistics).");
}
#endif
