// The two things that nvcc and g++ have to be told differently: how a kernel starts, and how a block gets its shared
// memory. g++ takes both from python_tests/harness/emulator, and so runs the same kernels on the CPU.
#pragma once

#include "common.cuh"

namespace bcmf {
// A block gets kUsualShared bytes of shared memory, static and dynamic together, without asking for them. No kernel
// that takes dynamic shared memory has more than kMostStatic bytes of static one.
constexpr int64_t kUsualShared = 48 << 10, kMostStatic = 2 << 10;
}  // namespace bcmf

#if defined(__CUDACC__)
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
BCMF_HOST_DEVICE T* dynamic_shared(int64_t offset, int64_t /*count*/) {
#if defined(__CUDA_ARCH__)
  extern __shared__ __align__(16) char memory[];
  return reinterpret_cast<T*>(memory + offset);
#else
  (void)offset;
  return nullptr;  // the host only adds up how much is taken
#endif
}
}  // namespace device
}  // namespace bcmf
#else
#include <emulator_launch.h>
#endif

namespace bcmf::device {

// Cuts the block's dynamic shared memory into arrays, which are the same for all its threads. On the host it only finds
// out how many bytes they take.
class SharedCutter {
 public:
  template <typename T>
  BCMF_HOST_DEVICE T* take(int64_t count) {
    const int64_t offset = bytes_;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return dynamic_shared<T>(offset, count);
  }
  BCMF_HOST_DEVICE int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

}  // namespace bcmf::device
