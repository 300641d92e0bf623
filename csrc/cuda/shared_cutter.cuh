// Parts of a block's dynamic shared memory.
#pragma once

#include "cuda/start.cuh"

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
