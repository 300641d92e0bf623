// The CPU kernels of bcmf::match_within, compiled once per instruction set and chosen at run time.
#pragma once

#include "match.h"

namespace bcmf::cpu {

constexpr int64_t kMatchLanes = 32;  // columns are read by so many, or fewer

// A pixel of a row that has a class, and the class.
struct MatchPixel {
  int32_t x, label;
};

// The pixels of any class, row after row.
struct MatchPixels {
  MatchPixel* list;  // with room for one more
  int64_t* starts;   // where those of a row begin, and where the last row's end
};

// What a thread works in; distances have 16 bits, squared, too.
struct MatchWork {
  const uint16_t* squares;  // of the distance along x, for the 2 most + 1 columns around a pixel; then too large ones
  const uint16_t* reaches;  // (count): squared radii
  int64_t stride;           // columns of a row below, of which `most` are left of the image
  // Of one class, (rows of a block + 1, stride): how many rows it is to the nearest site in a column. Of several,
  // (classes, stride): when a pass last saw a site of this class in this column, 0 for never, and before and after it.
  uint16_t* rows;
  MatchPixels sites, queries;  // of a block, of several classes
};

// Rows top..bottom of image n, of one class or of several.
using MatchKernel = void (*)(const MatchArgs&, const MatchWork&, int64_t n, int64_t top, int64_t bottom);

struct MatchIsaKernels {
  MatchKernel one_class, classes;
};
extern const MatchIsaKernels match_kernels_baseline, match_kernels_avx2, match_kernels_avx512;

}  // namespace bcmf::cpu
