// The tensors and options of bcmf::loss and its parts, checked, and as the kernels take them.
#pragma once

#include <optional>
#include <tuple>
#include <utility>

#include "tensors.h"

namespace bcmf {

struct LossOptions {
  int64_t ignore_index;
  bool align_corners, ce;
  std::optional<double> ohem_threshold;
  int64_t ohem_min_kept;
  double bcl_weight;
  IntList bcl_steps;
  FloatList bcl_flipped;
  double bcl_threshold;
  int64_t bcl_nms_size;
  double cpg_weight;
  int64_t cpg_kernel_size;
  bool cpg_window;
};

template <typename T>
struct LossOption {
  const char* name;
  T LossOptions::* field;
};
// In the order of the ops' schemas (bcmf_ext/ops.py; a test compares both).
inline constexpr std::tuple kLossOptions{
    LossOption{"ignore_index", &LossOptions::ignore_index},
    LossOption{"align_corners", &LossOptions::align_corners},
    LossOption{"ce", &LossOptions::ce},
    LossOption{"ohem_threshold", &LossOptions::ohem_threshold},
    LossOption{"ohem_min_kept", &LossOptions::ohem_min_kept},
    LossOption{"bcl_weight", &LossOptions::bcl_weight},
    LossOption{"bcl_steps", &LossOptions::bcl_steps},
    LossOption{"bcl_flipped", &LossOptions::bcl_flipped},
    LossOption{"bcl_threshold", &LossOptions::bcl_threshold},
    LossOption{"bcl_nms_size", &LossOptions::bcl_nms_size},
    LossOption{"cpg_weight", &LossOptions::cpg_weight},
    LossOption{"cpg_kernel_size", &LossOptions::cpg_kernel_size},
    LossOption{"cpg_window", &LossOptions::cpg_window},
};

// WithOptions<f>::call is f(options, tensors…), with the tensors and then each option as a parameter of its own, as
// torch calls an op.
template <auto f, typename Function = decltype(f), typename Options = decltype(kLossOptions)>
struct WithOptions;
template <auto f, typename Result, typename... Tensors, typename... T>
struct WithOptions<f, Result (*)(const LossOptions&, Tensors...), const std::tuple<LossOption<T>...>> {
  static Result call(Tensors... tensors, T... values) {
    LossOptions options;
    std::apply([&](const auto&... option) { ((options.*option.field = values), ...); }, kLossOptions);
    return f(options, tensors...);
  }
};

// The logits, labels and options of a call.
struct LossInputs {
  LossArgs args;
  std::optional<Tensor> weight;  // the converted class weights; keeps args.weight alive

  LossInputs(const LossOptions& options, const Tensor& logits, const Tensor& target,
             const std::optional<Tensor>& weight);
};

// The sizes of what a device's kernels keep for the backward: stats (stats_maps, N, H, W) and marks (mark_bytes,).
struct LossKept {
  int64_t stats_maps, mark_bytes;
};

// What bcmf::loss_sums returns, and its scratch memory.
struct LossSums {
  Tensor sums, cutoff, stats, selected, marks, nll;

  LossSums(const Tensor& logits, LossKept kept, LossArgs& args);
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> as_tuple() const { return {sums, cutoff, stats, selected, marks}; }
};

// What bcmf::loss_finish returns.
struct LossTotal {
  Tensor total, terms, summary;

  LossTotal(const Tensor& cutoff, LossArgs& args);
  std::tuple<Tensor, Tensor, Tensor> as_tuple() const { return {total, terms, summary}; }
};

// What bcmf::loss_finish takes, checked.
struct LossFinish {
  LossArgs args;
  Tensor sums, cutoff;

  LossFinish(const LossOptions& options, const Tensor& sums, const Tensor& cutoff);
};

// What bcmf::loss_backward takes beside the LossInputs, and the gradient that it returns.
struct LossGradient {
  Tensor grad_total, stats, selected, marks, summary, grad;

  LossGradient(const Tensor& grad_total, const Tensor& logits, const Tensor& stats, const Tensor& selected,
               const Tensor& marks, const Tensor& summary, LossKept kept, LossArgs& args);
};

// The results of bcmf::loss: total, terms, stats, selected, marks, summary.
using LossResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
inline LossResults as_results(const LossSums& sums, const LossTotal& finished) {
  return {finished.total, finished.terms, sums.stats, sums.selected, sums.marks, finished.summary};
}

// The arguments of an arg-max of logits that are resampled to (height, width): only sizes and logits are filled in.
LossArgs upsample_args(const Tensor& logits, int64_t height, int64_t width, bool align_corners);
Tensor empty_classes(const Tensor& logits, const LossArgs& args);

}  // namespace bcmf
