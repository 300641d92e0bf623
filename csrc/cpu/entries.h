// Entries of maps of any dtype and strides. Its functions are static, as those of math.h, because it is included once
// for each instruction set.
#pragma once

#include "common/args.h"
#include "cpu/math.h"

namespace bcmf::cpu {

// Calls f(pointer) with a pointer of the entries' own type to the entry at this offset.
template <typename Acc, typename F>
BCMF_INLINE auto with_entries(const MapView& v, int64_t offset, F f) {
  if constexpr (sizeof(Acc) == sizeof(double)) {
    return f(static_cast<double*>(v.data) + offset);
  } else {
    if (v.type == FloatType::f16) return f(static_cast<F16*>(v.data) + offset);
    if (v.type == FloatType::bf16) return f(static_cast<BF16*>(v.data) + offset);
    return f(static_cast<float*>(v.data) + offset);
  }
}

}  // namespace bcmf::cpu
