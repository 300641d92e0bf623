// What a GPU gives a block.
#pragma once

#include <cstdint>

namespace bcmf {

// A block gets kUsualShared bytes of shared memory, static and dynamic together, without asking for them. No kernel
// that takes dynamic shared memory has more than kMostStatic bytes of static one.
constexpr int64_t kUsualShared = 48 << 10, kMostStatic = 512;

}  // namespace bcmf
