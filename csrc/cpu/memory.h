#pragma once

#include <cstddef>

namespace bcmf::cpu {

// Memory of so many bytes does not stay in a cache, and malloc gets it anew from the system each time.
constexpr size_t kLarge = 32 << 20;

// Memory for what is large, tensors or scratch. The page faults of fresh memory take longer than our arithmetic. So it
// comes in pages of 2 MiB, where the system has them, and the last few blocks are kept for the next step, marked as
// free to be taken back by the system whenever it wants memory (MADV_FREE). Throws std::runtime_error (RuntimeError in
// Python).
void* allocate_large(size_t bytes);
void free_large(void* memory);
void release_kept_memory();

}  // namespace bcmf::cpu
