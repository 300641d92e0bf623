// Radix select finds the k-th largest of many losses without sorting them, and without the host's reading anything
// back. OHEM selects with it on CUDA and on the CPU.
//
// A loss is at least 0, so that its bits, read as an unsigned integer (the key), have its order; NaN is the largest.
// Level by level, from the highest bits down, the keys that agree with the prefix found so far are counted by their
// next digit; the digit in which the k-th largest lies joins the prefix. Counts are integers, which no order of
// additions changes.
#pragma once

#include <cstring>

#include "common/args.h"

namespace bcmf {

template <typename Acc>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = uint32_t;
};
template <>
struct KeyOf<double> {
  using type = uint64_t;
};

constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;

template <typename Acc>
constexpr int kKeyBits = 8 * sizeof(Acc);
template <typename Acc>
constexpr int kLevels = (kKeyBits<Acc> + kDigitBits - 1) / kDigitBits;  // 3 for float, 6 for double

template <typename Acc>
BCMF_HOST_DEVICE typename KeyOf<Acc>::type key_of(Acc loss) {
  typename KeyOf<Acc>::type key;
  memcpy(&key, &loss, sizeof(key));
  return key << 1 >> 1;  // without the sign
}

template <typename Acc>
BCMF_HOST_DEVICE Acc loss_of(typename KeyOf<Acc>::type key) {
  Acc loss;
  memcpy(&loss, &key, sizeof(loss));
  return loss;
}

// The lowest bit of a level's digit. The last level's digit has only the bits that are left.
template <typename Acc>
BCMF_HOST_DEVICE int digit_shift(int level) {
  const int shift = kKeyBits<Acc> - kDigitBits * (level + 1);
  return shift > 0 ? shift : 0;
}

// Returns the key's digit of this level, or -1 if its higher bits are not those of the prefix.
template <typename Acc>
BCMF_HOST_DEVICE int digit_of(typename KeyOf<Acc>::type key, typename KeyOf<Acc>::type prefix, int level) {
  const int shift = digit_shift<Acc>(level), bits = kKeyBits<Acc> - kDigitBits * level - shift;
  if (level > 0 && (key ^ prefix) >> shift >> bits != 0) return -1;
  return static_cast<int>(key >> shift) & ((1 << bits) - 1);
}

// The state of a selection. It lies in device memory for the CUDA kernels.
template <typename Acc>
struct Selection {
  typename KeyOf<Acc>::type prefix;
  int64_t rank;  // the loss looked for is the rank-th largest of those with this prefix; 0: nothing is looked for
};

}  // namespace bcmf
