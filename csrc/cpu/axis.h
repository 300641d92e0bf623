// Tables of how an axis is resampled.
#pragma once

#include <vector>

#include "common/geometry.h"

namespace bcmf::cpu {

template <typename Acc>
struct AxisTable {  // the axis_tap of each row or column that is resampled; null where none is
  const int32_t *first, *second;
  const Acc* weight;
};

template <typename Acc>
class Axis {  // owns the memory of an AxisTable; kernels do not make one (std::vector, see loss_kernel.inl)
 public:
  Axis(int64_t in, int64_t out, bool align_corners) : first_(out), second_(out), weight_(out) {
    for (int64_t i = 0; i < out; ++i) {
      const AxisTap<Acc> tap = axis_tap<Acc>(i, in, out, align_corners);
      first_[i] = static_cast<int32_t>(tap.first);
      second_[i] = static_cast<int32_t>(tap.second);
      weight_[i] = tap.weight;
    }
  }
  AxisTable<Acc> table() const { return {first_.data(), second_.data(), weight_.data()}; }

 private:
  std::vector<int32_t> first_, second_;
  std::vector<Acc> weight_;
};

}  // namespace bcmf::cpu
