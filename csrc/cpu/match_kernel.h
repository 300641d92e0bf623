// The CPU kernel of bcmf::match_within, compiled once per instruction set and chosen at run time.
#pragma once

#include "match.h"

namespace bcmf::cpu {

constexpr int64_t kMatchClasses = 32;  // a bit of a word for each

// What a thread works in: rows of a tile of columns, of which each has bits of the classes at a pixel.
struct MatchWork {
  int64_t tile;         // columns
  const int64_t* half;  // (count, 2 radius + 1): how far each row of a disc reaches to either side
  uint32_t* dilated;    // (2 radius + 1, radius + 1, tile): a ring of rows, each dilated by 0, 1, 2, … along x
  uint32_t* bits;       // (tile + 2 radius): a row of sites
  uint32_t* reached;    // (tile)
};

// Rows top..bottom of image n and of columns xa..xb, for the classes from `first` on.
using MatchKernel = void (*)(const MatchArgs&, const MatchWork&, int64_t n, int64_t first, int64_t top, int64_t bottom,
                             int64_t xa, int64_t xb);
extern const MatchKernel match_kernel_baseline, match_kernel_avx2, match_kernel_avx512;

}  // namespace bcmf::cpu
