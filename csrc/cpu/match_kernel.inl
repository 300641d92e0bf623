// Included by isa_<name>.cpp (see loss_kernel.inl).
// A disc is a pile of rows: row y of that of radius r reaches √(r² - y²) to either side. So all discs are unions of
// rows that are dilated along x, once for every length, and of all classes at a time.

#include "match_kernel.h"
#include "math.h"

namespace bcmf::cpu {
namespace BCMF_ISA {
namespace match {

template <typename Label>
static void load_bits(const MatchArgs& args, int64_t n, int64_t y, int64_t first, int64_t xa, int64_t xb,
                      uint32_t* __restrict bits) {
  const Label* row = static_cast<const Label*>(args.sites) + (n * args.H + y) * args.W;
  const int64_t left = xa < 0 ? 0 : xa, right = xb < args.W ? xb : args.W;
  const auto base = static_cast<uint32_t>(first), last = static_cast<uint32_t>(args.classes);
  for (int64_t x = xa; x < left; ++x) bits[x - xa] = 0;
  for (int64_t x = left; x < right; ++x) {
    const auto label = static_cast<uint32_t>(row[x]), bit = label - base;
    bits[x - xa] = label < last && bit < kMatchClasses ? 1u << (bit & 31) : 0;
  }
  for (int64_t x = right; x < xb; ++x) bits[x - xa] = 0;
}

// The row dilated by 0..radius.
static void dilate(const uint32_t* __restrict bits, int64_t radius, int64_t count, int64_t stride,
                   uint32_t* __restrict rows) {
  for (int64_t x = 0; x < count; ++x) rows[x] = bits[x + radius];
  for (int64_t r = 1; r <= radius; ++r) {
    const uint32_t* __restrict narrower = rows + (r - 1) * stride;
    uint32_t* __restrict row = rows + r * stride;
    for (int64_t x = 0; x < count; ++x) row[x] = narrower[x] | bits[x + radius - r] | bits[x + radius + r];
  }
}

template <typename Label>
static void store_found(const MatchArgs& args, int64_t n, int64_t y, int64_t first, int64_t xa, int64_t xb,
                        const uint32_t* __restrict reached, uint8_t index) {
  const int64_t offset = (n * args.H + y) * args.W + xa;
  const Label* __restrict row = static_cast<const Label*>(args.queries) + offset;
  uint8_t* __restrict found = args.found + offset;
  const auto base = static_cast<uint32_t>(first), last = static_cast<uint32_t>(args.classes);
  for (int64_t x = 0; x < xb - xa; ++x) {
    const auto label = static_cast<uint32_t>(row[x]), bit = label - base;
    const bool hit = label < last && bit < kMatchClasses && (reached[x] >> (bit & 31) & 1);
    found[x] = hit && index < found[x] ? index : found[x];
  }
}

template <typename Label>
static void find(const MatchArgs& args, const MatchWork& work, int64_t n, int64_t first, int64_t top, int64_t bottom,
                 int64_t xa, int64_t xb) {
  const int64_t most = args.radii[args.count - 1], ring = 2 * most + 1, count = xb - xa;
  const auto slot = [&](int64_t y) { return work.dilated + (y + ring) % ring * (most + 1) * work.tile; };
  for (int64_t y = top - most; y < bottom + most; ++y) {
    if (y >= 0 && y < args.H) {
      load_bits<Label>(args, n, y, first, xa - most, xb + most, work.bits);
      dilate(work.bits, most, count, work.tile, slot(y));
    }
    const int64_t middle = y - most;
    if (middle < top) continue;
    for (int64_t i = 0; i < args.count; ++i) {
      const int64_t radius = args.radii[i];
      for (int64_t x = 0; x < count; ++x) work.reached[x] = 0;
      for (int64_t dy = -radius; dy <= radius; ++dy) {
        if (middle + dy < 0 || middle + dy >= args.H) continue;
        const uint32_t* __restrict row = slot(middle + dy) + work.half[i * ring + dy + radius] * work.tile;
        uint32_t* __restrict reached = work.reached;
        for (int64_t x = 0; x < count; ++x) reached[x] |= row[x];
      }
      store_found<Label>(args, n, middle, first, xa, xb, work.reached, static_cast<uint8_t>(i));
    }
  }
}

static void find_any(const MatchArgs& args, const MatchWork& work, int64_t n, int64_t first, int64_t top,
                     int64_t bottom, int64_t xa, int64_t xb) {
  args.wide ? find<int32_t>(args, work, n, first, top, bottom, xa, xb)
            : find<uint8_t>(args, work, n, first, top, bottom, xa, xb);
}

}  // namespace match
}  // namespace BCMF_ISA
}  // namespace bcmf::cpu
