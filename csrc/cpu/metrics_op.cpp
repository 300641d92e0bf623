// The ops of the metrics, which run on the CPU alone (bcmf_ext/ops.py has the schemas).

#include <algorithm>
#include <tuple>

#include "cpu/labels.h"
#include "cpu/match.h"
#include "tensors.h"

namespace bcmf {
namespace {

// The kernels number labels and counts in 32 bits, and take memory for each class.
void check_classes(int64_t classes) {
  BCMF_CHECK(0 < classes && classes <= 1 << 16, "classes are from 1 to ", 1 << 16, ", not ", classes, ".");
}

void check_labels(const Tensor& labels, const char* name) {
  BCMF_CHECK(labels.scalar_type() == ScalarType::Byte || labels.scalar_type() == ScalarType::Int, name,
             " are uint8 or int32, not ", words(labels.scalar_type()), ".");
}

bool is_wide(const Tensor& labels) { return labels.scalar_type() == ScalarType::Int; }

void check_same_shape(const Tensor& first, const Tensor& other, const char* names) {
  BCMF_CHECK(has_sizes(other, first.sizes()), names, " have the same shape, not ", words(first.sizes()), " and ",
             words(other.sizes()), ".");
}

std::tuple<Tensor, Tensor, Tensor> read_labels(const Tensor& prediction, const Tensor& target, int64_t num_classes,
                                               int64_t ignore_index) {
  check_same_shape(prediction, target, "prediction and target");
  check_same_device(prediction, target, "prediction", "target");
  check_classes(num_classes);
  const Kind kind = kind_of(target).with(num_classes <= 255 ? ScalarType::Byte : ScalarType::Int);
  const Tensor guess = empty(target.sizes(), kind), truth = empty(target.sizes(), kind);
  const Tensor from = as_contiguous(prediction), labels = as_contiguous(target);
  const Tensor outside = empty({}, kind.with(ScalarType::Long));
  *outside.mutable_data_ptr<int64_t>() =
      cpu::read_labels({labels.numel(), num_classes, ignore_index, from.const_data_ptr(), labels.const_data_ptr(),
                        label_type(from.scalar_type(), "prediction"), label_type(labels.scalar_type(), "target"),
                        guess.mutable_data_ptr(), truth.mutable_data_ptr(), is_wide(guess)});
  return {guess, truth, outside};
}

Tensor count_pairs(const Tensor& a, const Tensor& b, int64_t rows, int64_t columns) {
  check_labels(a, "a");
  check_labels(b, "b");
  check_same_shape(a, b, "a and b");
  check_same_device(a, b, "a", "b");
  check_classes(rows);
  check_classes(columns);
  BCMF_CHECK((rows + 1) * (columns + 1) < int64_t{1} << 31, rows, " × ", columns, " counts are too many.");
  const Tensor pairs = zeros({rows, columns}, kind_of(a).with(ScalarType::Long));
  const Tensor first = as_contiguous(a), second = as_contiguous(b);
  cpu::count_pairs({first.numel(), rows, columns, first.const_data_ptr(), second.const_data_ptr(), is_wide(first),
                    is_wide(second), pairs.mutable_data_ptr<int64_t>()});
  return pairs;
}

Tensor match_within(const Tensor& queries, const Tensor& sites, int64_t num_classes, IntList radii) {
  BCMF_CHECK(queries.dim() == 3, "queries have the shape (N, H, W), not ", words(queries.sizes()), ".");
  check_same_shape(queries, sites, "queries and sites");
  check_labels(queries, "queries");
  BCMF_CHECK(queries.scalar_type() == sites.scalar_type(), "queries and sites have the same dtype.");
  check_same_device(queries, sites, "queries", "sites");
  BCMF_CHECK(!radii.empty() && radii.size() < 256 && radii[0] >= 0 && radii.back() <= cpu::kMatchMost &&
                 std::is_sorted(radii.begin(), radii.end()),
             "radii ascend from at least 0 to at most ", cpu::kMatchMost, " pixels, not ", words(radii), ".");
  check_classes(num_classes);
  const Tensor from = as_contiguous(queries), to = as_contiguous(sites);
  const Tensor found = empty(queries.sizes(), kind_of(queries).with(ScalarType::Byte));
  if (found.numel() > 0)
    cpu::match_within({from.size(0), from.size(1), from.size(2), num_classes, from.data_ptr(), to.data_ptr(),
                       is_wide(from), radii.data(), static_cast<int64_t>(radii.size()),
                       found.mutable_data_ptr<uint8_t>()});
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bcmf, CPU, m) {
  m.impl("read_labels", TORCH_BOX(&read_labels));
  m.impl("count_pairs", TORCH_BOX(&count_pairs));
  m.impl("match_within", TORCH_BOX(&match_within));
}

}  // namespace bcmf
