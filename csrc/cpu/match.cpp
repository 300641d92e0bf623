#include "match.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "isa.h"
#include "match_kernel.h"

namespace bcmf::cpu {

void match_within(const MatchArgs& args) {
  constexpr int64_t kColumns = 512, kRows = 64;  // the ring stays in the second-level cache; a block's halo is small
  const int64_t most = args.radii[args.count - 1], ring = 2 * most + 1;
  std::vector<int64_t> half(args.count * ring);
  for (int64_t i = 0; i < args.count; ++i)
    for (int64_t radius = args.radii[i], dy = -radius; dy <= radius; ++dy) {
      auto reach = static_cast<int64_t>(std::sqrt(static_cast<double>(radius * radius - dy * dy)));
      half[i * ring + dy + radius] = reach;
    }
  std::fill(args.found, args.found + args.N * args.H * args.W, static_cast<uint8_t>(args.count));
  const int64_t blocks = (args.H + kRows - 1) / kRows, columns = (args.W + kColumns - 1) / kColumns;
  at::parallel_for(0, args.N * blocks * columns, 1, [&](int64_t begin, int64_t end) {
    const int64_t tile = std::min(args.W, kColumns);
    std::vector<uint32_t> scratch(ring * (most + 1) * tile + tile + 2 * most + tile);
    uint32_t* const bits = scratch.data() + ring * (most + 1) * tile;
    const MatchWork work = {tile, half.data(), scratch.data(), bits, bits + tile + 2 * most};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / (blocks * columns), block = task / columns % blocks, column = task % columns;
      const int64_t top = block * kRows, bottom = std::min(top + kRows, args.H);
      const int64_t xa = column * kColumns, xb = std::min(xa + kColumns, args.W);
      for (int64_t first = 0; first < args.classes; first += kMatchClasses)
        isa().match(args, work, n, first, top, bottom, xa, xb);
    }
  });
}

}  // namespace bcmf::cpu
