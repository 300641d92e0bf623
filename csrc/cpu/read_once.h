// Reading what others may write at any time: a loader may refill its buffer of labels while a kernel works on it. An id
// that was checked must be the id that is used as an index, so it is read once, and only the copy is looked at.
// Static: included once per instruction set.
#pragma once

#include <cstdint>

namespace bcmf::cpu {

// A single id. Volatile keeps the compiler from reading it again.
template <typename T>
static inline __attribute__((always_inline)) T read_once(const T* from) {
  return *static_cast<const volatile T*>(from);
}

// `count` ids that lie `stride` apart. A plain loop, which the compiler vectorises; behind the barrier it has to take
// them from the copy.
template <typename T>
static inline __attribute__((always_inline)) void copy_once(const T* from, int64_t stride, int64_t count, T* to) {
  if (stride == 1)
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  else
    for (int64_t i = 0; i < count; ++i) to[i] = from[i * stride];
  asm volatile("" : : "r"(to) : "memory");
}

}  // namespace bcmf::cpu
