// In the place of csrc/cpu/parallel.h, for kernels that are compiled without torch: one thread.
#pragma once

#include <cstdint>

namespace bcmf::cpu {

template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  f(begin, end);
}

}  // namespace bcmf::cpu
