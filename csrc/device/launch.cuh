// What the kernels cannot say in C++ alone: how one starts, and how a block gets its shared memory. g++ takes both from
// the emulator of python_tests/harness/emulator, and so runs the same kernels on the CPU.
#pragma once

#include "common.cuh"

namespace bcmf {
// Shared memory, static and dynamic, that a block is given without asking; and more than any kernel has of the static.
constexpr int64_t kUsualShared = 48 << 10, kMostStatic = 2 << 10;
}  // namespace bcmf

#if defined(__CUDACC__)
#define BCMF_SHARED(type, name, count) __shared__ type name[count]

namespace bcmf {

// blocks of `threads`, each with `shared` bytes of dynamic shared memory.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, int64_t shared, cudaStream_t stream,
            const Arguments&... arguments) {
  if (shared > kUsualShared - kMostStatic) {  // asks for all there is: another thread may launch the same kernel
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
// The block's dynamic shared memory from `offset` on, of which `count` entries are used.
template <typename T>
BCMF_HOST_DEVICE T* dynamic_shared(int64_t offset, int64_t /*count*/) {
#if defined(__CUDA_ARCH__)
  extern __shared__ __align__(16) char memory[];
  return reinterpret_cast<T*>(memory + offset);
#else
  (void)offset;
  return nullptr;  // the host only wants to know how much it takes
#endif
}
}  // namespace device
}  // namespace bcmf
#else
#include <emulator_launch.h>
#endif

namespace bcmf::device {

// Cuts the block's dynamic shared memory into arrays, for all its threads alike; on the host, to see what they take.
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
