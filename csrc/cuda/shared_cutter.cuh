// Parts of a block's dynamic shared memory.
#pragma once

#include "cuda/start.cuh"

namespace bcmf::device {

// Cuts the block's dynamic shared memory into arrays, which are the same for all its threads. On the host it only finds
// out how many bytes they take, which may be more than there are.
class SharedCutter {
 public:
#if defined(__CUDA_ARCH__)
  using Bytes = int;  // a kernel runs only if they fit
#else
  using Bytes = int64_t;
#endif
  template <typename T>
  BCMF_HOST_DEVICE T* take(int64_t count) {
    const Bytes offset = bytes_;
    bytes_ += (static_cast<Bytes>(count) * static_cast<Bytes>(sizeof(T)) + 15) / 16 * 16;
    return dynamic_shared<T>(offset, count);
  }
  BCMF_HOST_DEVICE int64_t bytes() const { return bytes_; }

 private:
  Bytes bytes_ = 0;
};

}  // namespace bcmf::device
