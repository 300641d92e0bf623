// Parts of a block's dynamic shared memory: the host cuts it into arrays, which a kernel gets as arguments.
#pragma once

#include "cuda/start.cuh"

namespace bcmf {

// An array that is the same for all threads of a block.
template <typename T>
struct SharedArray {
  int offset, count;
  __device__ __forceinline__ T* data() const { return device::dynamic_shared<T>(offset, count); }
};

// Cuts the memory into arrays, which may be more than there is: `bytes` tells.
class SharedCutter {
 public:
  template <typename T>
  SharedArray<T> take(int64_t count) {
    const int64_t offset = bytes_;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return {static_cast<int>(offset), static_cast<int>(count)};
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

}  // namespace bcmf
