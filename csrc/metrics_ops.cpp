// Binds what the metrics need on the CPU (bcmf_ext/ops.py has the schema); there is nothing here to emulate.
#ifndef BCMF_EMULATED

#include <algorithm>

#include "cpu/match.h"
#include "ops.h"

namespace bcmf {
namespace {

at::Tensor match_within_cpu(const at::Tensor& queries, const at::Tensor& sites, int64_t num_classes,
                            at::IntArrayRef radii) {
  TORCH_CHECK_VALUE(queries.dim() == 3 && queries.sizes() == sites.sizes(),
                    "queries and sites have the same shape (N, H, W), not ", queries.sizes(), " and ", sites.sizes(),
                    ".");
  TORCH_CHECK_TYPE(queries.scalar_type() == sites.scalar_type() &&
                       (queries.scalar_type() == at::kByte || queries.scalar_type() == at::kInt),
                   "queries and sites are both uint8 or both int32.");
  check_same_device(queries, sites, "queries", "sites");
  TORCH_CHECK_VALUE(!radii.empty() && radii.size() < 256 && radii[0] >= 0 && radii.back() <= 128 &&
                        std::is_sorted(radii.begin(), radii.end()),
                    "radii ascend from at least 0 to at most 128 pixels, not ", radii, ".");
  TORCH_CHECK_VALUE(num_classes >= 0 && num_classes < int64_t{1} << 31, "there are no ", num_classes, " classes.");
  const at::Tensor from = queries.contiguous(), to = sites.contiguous();
  const at::Tensor found = at::empty(queries.sizes(), queries.options().dtype(at::kByte));
  if (found.numel() > 0)
    cpu::match_within({from.size(0), from.size(1), from.size(2), num_classes, from.data_ptr(), to.data_ptr(),
                       from.scalar_type() == at::kInt, radii.data(), static_cast<int64_t>(radii.size()),
                       found.mutable_data_ptr<uint8_t>()});
  return found;
}

}  // namespace

void register_metrics_cpu(torch::Library& m) { m.impl("match_within", &match_within_cpu); }

}  // namespace bcmf
#endif
