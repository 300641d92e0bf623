// The CPU kernels of bcmf::match_within. Each isa_<name>.cpp includes this file (see loss_kernel.inl).
// The nearest site is found column by column. A pass goes down the rows, and knows for each column how many rows ago it
// saw a site; of the columns around a pixel, the smallest dx² + dy² counts. A second pass goes up.

#include "cpu/match_kernel.h"
#include "cpu/math.h"
#include "cpu/read_once.h"

namespace bcmf::cpu {
namespace BCMF_ISA {
namespace match {

using Lanes = Vector<uint16_t>;
constexpr int64_t kLanes = kWidth<uint16_t>;
static_assert(kLanes <= kMatchLanes);

BCMF_INLINE Lanes lanes_of(int64_t value) { return Lanes{} + static_cast<uint16_t>(value); }
BCMF_INLINE Lanes least(Lanes a, Lanes b) { return a < b ? a : b; }
BCMF_INLINE bool is_class(const MatchArgs& args, int64_t label) {
  return static_cast<uint32_t>(label) < static_cast<uint32_t>(args.classes);
}

template <typename Label>
BCMF_INLINE const Label* row_of(const MatchArgs& args, const void* map, int64_t n, int64_t y) {
  return static_cast<const Label*>(map) + (n * args.H + y) * args.W;
}

// Calls f(y, asked) for the rows in the order in which a pass sees them, down or up: first the `most` rows before
// top..bottom, where asked is false, then these.
template <typename F>
BCMF_INLINE void for_rows(const MatchArgs& args, int64_t most, int64_t top, int64_t bottom, bool down, F f) {
  for (int64_t i = -most; i < bottom - top; ++i) {
    const int64_t y = down ? top + i : bottom - 1 - i;
    if (y >= 0 && y < args.H) f(y, i >= 0);
  }
}

// --------------------------------------------------------------------------------------------------------------------
// One class: every pixel looks for a site

// Takes a pass one row further: `rows` says for each column how many rows ago there was a site, at most `most` + 1.
template <typename Label>
static void step(const MatchArgs& args, const Label* sites, uint16_t most, uint16_t* __restrict rows) {
  const auto far = static_cast<uint16_t>(most + 1);
  for (int64_t x = 0; x < args.W; ++x) {
    const uint16_t next = rows[x] < far ? rows[x] + 1 : far;
    rows[x] = is_class(args, sites[x]) ? 0 : next;
  }
}

// Returns for kLanes pixels the index of the first radius within which there is a site. `rows` are squared numbers of
// rows, from `most` columns to the left of the first pixel on.
BCMF_INLINE Lanes reach(const MatchArgs& args, const MatchWork& work, int64_t most, const uint16_t* rows) {
  Lanes nearest = lanes_of(0xffff), index = {};
  for (int64_t dx = 0; dx <= 2 * most; ++dx) nearest = least(nearest, load_vector(rows + dx) + work.squares[dx]);
  for (int64_t i = 0; i < args.count; ++i) index += work.reaches[i] < nearest ? lanes_of(1) : Lanes{};
  return index;
}

// Finds the radii of a row of the image; `rows` as for reach.
template <typename Label>
static void find_row(const MatchArgs& args, const MatchWork& work, int64_t most, const Label* queries,
                     const uint16_t* rows, uint8_t* found) {
  for (int64_t xa = 0; xa < args.W; xa += kLanes) {
    uint16_t index[kLanes];
    store_vector(reach(args, work, most, rows + xa), index);
    const int64_t count = args.W - xa < kLanes ? args.W - xa : kLanes;
    for (int64_t i = 0; i < count; ++i)
      if (is_class(args, queries[xa + i])) found[xa + i] = static_cast<uint8_t>(index[i]);
  }
}

template <typename Label>
static void find_one_class(const MatchArgs& args, const MatchWork& work, int64_t n, int64_t top, int64_t bottom) {
  const int64_t most = args.radii[args.count - 1], stride = work.stride;
  uint16_t* const pass = work.rows + (bottom - top) * stride;
  const auto restart = [&] {
    for (int64_t x = 0; x < stride; ++x) pass[x] = static_cast<uint16_t>(most + 1);
  };
  restart();
  for_rows(args, most, top, bottom, true, [&](int64_t y, bool asked) {
    step(args, row_of<Label>(args, args.sites, n, y), static_cast<uint16_t>(most), pass + most);
    uint16_t* const rows = work.rows + (y - top) * stride;
    for (int64_t x = 0; asked && x < stride; ++x) rows[x] = pass[x];
  });
  restart();
  for_rows(args, most, top, bottom, false, [&](int64_t y, bool asked) {
    step(args, row_of<Label>(args, args.sites, n, y), static_cast<uint16_t>(most), pass + most);
    if (!asked) return;
    uint16_t* const rows = work.rows + (y - top) * stride;
    for (int64_t x = 0; x < stride; x += kLanes) {
      const Lanes nearer = least(load_vector(rows + x), load_vector(pass + x));
      store_vector(nearer * nearer, rows + x);
    }
    const int64_t row = (n * args.H + y) * args.W;
    find_row(args, work, most, row_of<Label>(args, args.queries, n, y), rows, args.found + row);
  });
}

// --------------------------------------------------------------------------------------------------------------------
// Several classes: pixels that have a class look for a site

// Lists the pixels of any class in rows top..bottom together with the class that was checked, since labels may change
// at any time.
template <typename Label>
static void list_pixels(const MatchArgs& args, const void* map, int64_t n, int64_t top, int64_t bottom,
                        MatchPixels pixels) {
  int64_t count = 0;
  for (int64_t y = top; y < bottom; ++y) {
    const Label* const row = row_of<Label>(args, map, n, y);
    pixels.starts[y - top] = count;
    for (int64_t xa = 0; xa < args.W; xa += kMatchLanes) {
      const int64_t xb = args.W - xa < kMatchLanes ? args.W : xa + kMatchLanes;
      bool some = false;
      for (int64_t x = xa; x < xb; ++x) some |= is_class(args, row[x]);
      if (!some) continue;
      for (int64_t x = xa; x < xb; ++x) {
        const int64_t label = read_once(row + x);
        pixels.list[count] = {static_cast<int32_t>(x), static_cast<int32_t>(label)};
        count += is_class(args, label);
      }
    }
  }
  pixels.starts[bottom - top] = count;
}

// Returns the squared number of rows since kLanes columns last saw a site, or (most + 1)² where that is too long ago.
BCMF_INLINE Lanes square_rows(const uint16_t* seen, uint16_t now, int64_t most) {
  const Lanes rows = least(now - load_vector(seen), lanes_of(most + 1));
  return rows * rows;
}

// Returns the index of the first radius within which there is a site of a pixel's class. `seen` are the times at which
// columns saw one, from `most` columns to the left of the pixel on.
BCMF_INLINE uint8_t reach(const MatchArgs& args, const MatchWork& work, int64_t most, const uint16_t* seen,
                          uint16_t now) {
  Lanes nearest = square_rows(seen, now, most) + load_vector(work.squares);
  for (int64_t dx = kLanes; dx <= 2 * most; dx += kLanes)
    nearest = least(nearest, square_rows(seen + dx, now, most) + load_vector(work.squares + dx));
  uint16_t lanes[kLanes], distance = 0xffff;
  store_vector(nearest, lanes);
  BCMF_LANES
  for (int64_t i = 0; i < kLanes; ++i) distance = lanes[i] < distance ? lanes[i] : distance;
  int64_t index = 0;
  for (int64_t i = 0; i < args.count; ++i) index += work.reaches[i] < distance;
  return static_cast<uint8_t>(index);
}

template <typename Label>
static void find_classes(const MatchArgs& args, const MatchWork& work, int64_t n, int64_t top, int64_t bottom) {
  const int64_t most = args.radii[args.count - 1];
  const int64_t above = top < most ? 0 : top - most, below = args.H - bottom < most ? args.H : bottom + most;
  list_pixels<Label>(args, args.sites, n, above, below, work.sites);
  list_pixels<Label>(args, args.queries, n, top, bottom, work.queries);
  const auto pass = [&](bool down) {
    auto now = static_cast<uint16_t>(most + 1);  // long enough after 0, which stands for never
    for_rows(args, most, top, bottom, down, [&](int64_t y, bool asked) {
      for (int64_t i = work.sites.starts[y - above]; i < work.sites.starts[y - above + 1]; ++i) {
        const MatchPixel site = work.sites.list[i];
        work.rows[site.label * work.stride + most + site.x] = now;
      }
      if (asked) {
        uint8_t* const found = args.found + (n * args.H + y) * args.W;
        for (int64_t i = work.queries.starts[y - top]; i < work.queries.starts[y - top + 1]; ++i) {
          const MatchPixel query = work.queries.list[i];
          const uint8_t index = reach(args, work, most, work.rows + query.label * work.stride + query.x, now);
          found[query.x] = index < found[query.x] ? index : found[query.x];
        }
      }
      ++now;
    });
    for (int64_t i = 0; i < work.sites.starts[below - above]; ++i) {
      const MatchPixel site = work.sites.list[i];
      work.rows[site.label * work.stride + most + site.x] = 0;
    }
  };
  pass(true);
  pass(false);
}

static void one_class(const MatchArgs& args, const MatchWork& work, int64_t n, int64_t top, int64_t bottom) {
  args.wide ? find_one_class<int32_t>(args, work, n, top, bottom) : find_one_class<uint8_t>(args, work, n, top, bottom);
}

static void classes(const MatchArgs& args, const MatchWork& work, int64_t n, int64_t top, int64_t bottom) {
  args.wide ? find_classes<int32_t>(args, work, n, top, bottom) : find_classes<uint8_t>(args, work, n, top, bottom);
}

constexpr MatchIsaKernels kernels = {one_class, classes};

}  // namespace match
}  // namespace BCMF_ISA
}  // namespace bcmf::cpu
