// Binds the CPU kernels of the metrics to torch.ops.bcmf (bcmf_ext/ops.py has the schemas). None of them runs on CUDA,
// so that the emulator has nothing to do here.
#ifndef BCMF_EMULATED

#include <algorithm>
#include <tuple>

#include "cpu/labels.h"
#include "cpu/match.h"
#include "ops.h"

namespace bcmf {
namespace {

using at::Tensor;

// The kernels number labels and counts in 32 bits, and take memory for each class.
void check_classes(int64_t classes) {
  TORCH_CHECK_VALUE(0 < classes && classes <= 1 << 16, "classes are from 1 to ", 1 << 16, ", not ", classes, ".");
}

void check_labels(const Tensor& labels, const char* name) {
  TORCH_CHECK_TYPE(labels.scalar_type() == at::kByte || labels.scalar_type() == at::kInt, name,
                   " are uint8 or int32, not ", labels.scalar_type(), ".");
}

bool is_wide(const Tensor& labels) { return labels.scalar_type() == at::kInt; }

void check_same_shape(const Tensor& first, const Tensor& other, const char* names) {
  TORCH_CHECK_VALUE(first.sizes() == other.sizes(), names, " have the same shape, not ", first.sizes(), " and ",
                    other.sizes(), ".");
}

std::tuple<Tensor, Tensor, Tensor> read_labels_cpu(const Tensor& prediction, const Tensor& target, int64_t num_classes,
                                                   int64_t ignore_index) {
  check_same_shape(prediction, target, "prediction and target");
  check_same_device(prediction, target, "prediction", "target");
  check_classes(num_classes);
  const auto options = target.options().dtype(num_classes <= 255 ? at::kByte : at::kInt);
  const Tensor guess = at::empty(target.sizes(), options), truth = at::empty(target.sizes(), options);
  const Tensor from = prediction.contiguous(), labels = target.contiguous();
  const int64_t outside =
      cpu::read_labels({labels.numel(), num_classes, ignore_index, from.const_data_ptr(), labels.const_data_ptr(),
                        label_type(from.scalar_type(), "prediction"), label_type(labels.scalar_type(), "target"),
                        guess.mutable_data_ptr(), truth.mutable_data_ptr(), is_wide(guess)});
  return {guess, truth, at::full({}, outside, target.options().dtype(at::kLong))};
}

Tensor count_pairs_cpu(const Tensor& a, const Tensor& b, int64_t rows, int64_t columns) {
  check_labels(a, "a");
  check_labels(b, "b");
  check_same_shape(a, b, "a and b");
  check_same_device(a, b, "a", "b");
  check_classes(rows);
  check_classes(columns);
  TORCH_CHECK_VALUE((rows + 1) * (columns + 1) < int64_t{1} << 31, rows, " × ", columns, " counts are too many.");
  const Tensor pairs = at::zeros({rows, columns}, a.options().dtype(at::kLong));
  const Tensor first = a.contiguous(), second = b.contiguous();
  cpu::count_pairs({first.numel(), rows, columns, first.const_data_ptr(), second.const_data_ptr(), is_wide(first),
                    is_wide(second), pairs.mutable_data_ptr<int64_t>()});
  return pairs;
}

Tensor match_within_cpu(const Tensor& queries, const Tensor& sites, int64_t num_classes, at::IntArrayRef radii) {
  TORCH_CHECK_VALUE(queries.dim() == 3, "queries have the shape (N, H, W), not ", queries.sizes(), ".");
  check_same_shape(queries, sites, "queries and sites");
  check_labels(queries, "queries");
  TORCH_CHECK_TYPE(queries.scalar_type() == sites.scalar_type(), "queries and sites have the same dtype.");
  check_same_device(queries, sites, "queries", "sites");
  TORCH_CHECK_VALUE(!radii.empty() && radii.size() < 256 && radii[0] >= 0 && radii.back() <= cpu::kMatchMost &&
                        std::is_sorted(radii.begin(), radii.end()),
                    "radii ascend from at least 0 to at most ", cpu::kMatchMost, " pixels, not ", radii, ".");
  check_classes(num_classes);
  const Tensor from = queries.contiguous(), to = sites.contiguous();
  const Tensor found = at::empty(queries.sizes(), queries.options().dtype(at::kByte));
  if (found.numel() > 0)
    cpu::match_within({from.size(0), from.size(1), from.size(2), num_classes, from.data_ptr(), to.data_ptr(),
                       is_wide(from), radii.data(), static_cast<int64_t>(radii.size()),
                       found.mutable_data_ptr<uint8_t>()});
  return found;
}

}  // namespace

void register_metrics_cpu(torch::Library& m) {
  m.impl("read_labels", &read_labels_cpu);
  m.impl("count_pairs", &count_pairs_cpu);
  m.impl("match_within", &match_within_cpu);
}

}  // namespace bcmf
#endif
