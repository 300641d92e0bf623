// The CPU kernels of bcmf::match_within, compiled once per instruction set and chosen at run time.
#pragma once

#include "cpu/match.h"

namespace bcmf::cpu {

constexpr int64_t kMatchLanes = 32;  // the most columns that a vector reads at once

// A pixel that has a class: its column, and the class.
struct MatchPixel {
  int32_t x, label;
};

// The pixels of any class, row after row.
struct MatchPixels {
  MatchPixel* list;  // with room for one more
  int64_t* starts;   // where the pixels of each row begin, and where those of the last row end
};

// The tables and the memory that a thread works in. Distances, also squared ones, have 16 bits.
struct MatchWork {
  // Squared distances along x of the 2 most + 1 columns around a pixel, followed by numbers that are too large to
  // count.
  const uint16_t* squares;
  const uint16_t* reaches;  // (count): squared radii
  int64_t stride;           // columns of a row below, of which `most` are left of the image
  // With one class, (rows of a block + 1, stride): how many rows it is to the nearest site in a column; the last row is
  // that of the pass. With several, (classes, stride): the time at which a pass last saw a site of this class in this
  // column. It is 0 for never, and between passes.
  uint16_t* rows;
  MatchPixels sites, queries;  // of a block; only with several classes
};

// Works on the rows top..bottom of image n; there is one kernel for one class and one for several.
using MatchKernel = void (*)(const MatchArgs&, const MatchWork&, int64_t n, int64_t top, int64_t bottom);

struct MatchIsaKernels {
  MatchKernel one_class, classes;
};

}  // namespace bcmf::cpu
