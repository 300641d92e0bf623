#pragma once

#include <cstddef>

namespace bcmf::cpu {

// Memory of at least so many bytes does not stay in a cache, and malloc gets it anew from the system each time.
constexpr size_t kLarge = 32 << 20;

// Large tensors and scratch memory come from here. The page faults of fresh memory take longer than the arithmetic of
// the kernels. So this memory comes in pages of 2 MiB, where the system has them, and the last few blocks are kept for
// the next step, marked so that the system may take them back whenever it needs memory (MADV_FREE). allocate_large
// throws std::runtime_error (RuntimeError in Python).
void* allocate_large(size_t bytes);
void free_large(void* memory);
void release_kept_memory();

}  // namespace bcmf::cpu
