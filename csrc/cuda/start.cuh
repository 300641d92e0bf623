// How a kernel starts, and how a block gets its shared memory. A program that runs these kernels without a GPU puts a
// file of its own in the place of this one.
#pragma once

#include "common/args.h"
#include "cuda/limits.h"

#define BCMF_SHARED(type, name, count) __shared__ type name[count]

namespace bcmf {

// Starts blocks of `threads` threads, each with `shared` bytes of dynamic shared memory.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, int64_t shared, cudaStream_t stream,
            const Arguments&... arguments) {
  if (shared > kUsualShared - kMostStatic) {
    // The limit is raised to all there is, since another host thread may launch the same kernel with more at any time.
    int device = 0, most = 0;
    cudaFuncAttributes attributes = {};
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaFuncGetAttributes(&attributes, kernel);
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         most - static_cast<int>(attributes.sharedSizeBytes));
  }
  kernel<<<blocks, threads, shared, stream>>>(arguments...);
}

namespace device {
// Returns the block's dynamic shared memory from `offset` on, of which the caller uses `count` entries.
template <typename T>
__device__ __forceinline__ T* dynamic_shared(int offset, int /*count*/) {
  extern __shared__ __align__(16) char memory[];
  return reinterpret_cast<T*>(memory + offset);
}
}  // namespace device
}  // namespace bcmf
