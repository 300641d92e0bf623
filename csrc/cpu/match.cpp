#include "cpu/match.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "cpu/isa.h"
#include "cpu/match_kernel.h"
#include "cpu/parallel.h"

namespace bcmf::cpu {
namespace {

// Returns zeros that take memory only where something is written to, because few of many classes occur.
std::unique_ptr<uint16_t, decltype(&std::free)> allocate_zeros(int64_t count) {
  auto* const zeros = static_cast<uint16_t*>(std::calloc(count, sizeof(uint16_t)));
  if (!zeros) throw std::bad_alloc();
  return {zeros, &std::free};
}

}  // namespace

void match_within(const MatchArgs& args) {
  constexpr int64_t kRows = 128;  // so many that the rows around a block, which it reads, too, are few beside them
  const int64_t most = args.radii[args.count - 1];
  std::vector<uint16_t> squares(2 * most + 1 + kMatchLanes, 40000);  // 40000 > most², and + (most + 1)² < 2^16
  for (int64_t dx = -most; dx <= most; ++dx) squares[dx + most] = static_cast<uint16_t>(dx * dx);
  std::vector<uint16_t> reaches(args.count);
  for (int64_t i = 0; i < args.count; ++i) reaches[i] = static_cast<uint16_t>(args.radii[i] * args.radii[i]);
  std::fill(args.found, args.found + args.N * args.H * args.W, static_cast<uint8_t>(args.count));
  const int64_t blocks = (args.H + kRows - 1) / kRows;
  const int64_t stride = (args.W + 2 * most + 2 * kMatchLanes - 1) / kMatchLanes * kMatchLanes;
  const bool one = args.classes == 1;
  parallel_for(0, args.N * blocks, 1, [&](int64_t begin, int64_t end) {
    const auto rows = allocate_zeros((one ? kRows + 1 : args.classes) * stride);
    const int64_t asked = one ? 0 : kRows, around = one ? 0 : kRows + 2 * most;
    const auto sites = std::make_unique_for_overwrite<MatchPixel[]>(around * args.W + 1);
    const auto queries = std::make_unique_for_overwrite<MatchPixel[]>(asked * args.W + 1);
    std::vector<int64_t> site_starts(around + 1), query_starts(asked + 1);
    const MatchWork work = {squares.data(),
                            reaches.data(),
                            stride,
                            rows.get(),
                            {sites.get(), site_starts.data()},
                            {queries.get(), query_starts.data()}};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / blocks, top = task % blocks * kRows, bottom = std::min(top + kRows, args.H);
      (one ? isa().match.one_class : isa().match.classes)(args, work, n, top, bottom);
    }
  });
}

}  // namespace bcmf::cpu
