#pragma once

#include <cstdint>

namespace bcmf::cpu {

constexpr int64_t kMatchMost = 128;  // the largest radius: squared distances have 16 bits

// The arguments of bcmf::match_within. Maps are (N, H, W), contiguous; a label of `classes` or more is no class.
struct MatchArgs {
  int64_t N, H, W, classes;
  const void *queries, *sites;  // uint8, or int32 if wide
  bool wide;
  const int64_t* radii;  // ascending
  int64_t count;         // how many radii
  uint8_t* found;
};

void match_within(const MatchArgs& args);

}  // namespace bcmf::cpu
