#pragma once

#include <cstdint>

#include "common/args.h"

namespace bcmf::cpu {

// The arguments of bcmf::read_labels. Maps are contiguous.
struct ReadLabelsArgs {
  int64_t count, classes, ignore_index;
  const void *prediction, *target;
  LabelType prediction_type, target_type;
  void *guess, *truth;  // uint8, or int32 if wide: `classes` where a pixel does not count
  bool wide;
};

// The arguments of bcmf::count_pairs.
struct CountPairsArgs {
  int64_t count, rows, columns;
  const void *a, *b;  // uint8, or int32 if wide
  bool a_wide, b_wide;
  int64_t* pairs;  // (rows, columns), added to
};

int64_t read_labels(const ReadLabelsArgs& args);  // returns how many pixels are out of range
void count_pairs(const CountPairsArgs& args);

}  // namespace bcmf::cpu
