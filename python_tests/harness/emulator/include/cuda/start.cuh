// In the place of csrc/cuda/start.cuh: how a kernel starts, and how a block gets its shared memory, over the emulator.
#pragma once

#include <cuda_runtime_api.h>

#include "common/args.h"
#include "cuda/limits.h"
#include "emulator.h"

namespace bcmf {
template <typename... Parameters, typename Stream, typename... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, int64_t shared, Stream,
            const Arguments&... arguments) {
  emulator::launch(blocks, threads, shared, [&] { kernel(arguments...); });
  if (shared > 0 && emulator::block.most_static_bytes > kMostStatic)
    throw std::runtime_error("a kernel has dynamic shared memory, and more than kMostStatic bytes of static one");
  if (shared + emulator::block.most_static_bytes > emulator::shared_memory)
    throw std::runtime_error("a launch that asks for more shared memory than a block gets fails on CUDA");
}
namespace device {
// An array of its own, so that AddressSanitizer knows its bounds; nothing outside a launch, where it is only measured.
template <typename T>
T* dynamic_shared(int64_t offset, int64_t count) {
  if (!emulator::block.launched || count == 0) return nullptr;
  if (offset + count * static_cast<int64_t>(sizeof(T)) > emulator::block.dynamic_bytes)
    emulator::stop("a block uses more dynamic shared memory than its launch asked for");
  return emulator::poisoned<T>(emulator::block.dynamic[offset], static_cast<size_t>(count));
}
}  // namespace device
}  // namespace bcmf
