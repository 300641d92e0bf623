// How to read labels that others may write at any time: a loader may refill its buffer of labels while a kernel works
// on it. The id that is used as an index must be the id that was checked. So it is read once, and only the copy is
// used. The functions are static, because this file is included once for each instruction set.
#pragma once

#include <cstdint>

namespace bcmf::cpu {

// Reads a single id. Volatile keeps the compiler from reading it again.
template <typename T>
static inline __attribute__((always_inline)) T read_once(const T* from) {
  return *static_cast<const volatile T*>(from);
}

// Copies `count` ids that lie `stride` apart, in plain loops, which the compiler vectorises. The barrier makes it use
// the copy from there on.
template <typename T>
static inline __attribute__((always_inline)) void copy_once(const T* from, int64_t stride, int64_t count, T* to) {
  if (stride == 1)
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  else
    for (int64_t i = 0; i < count; ++i) to[i] = from[i * stride];
  asm volatile("" : : "r"(to) : "memory");
}

}  // namespace bcmf::cpu
