// Scratch memory that a launcher cuts into arrays.
#pragma once

#include <cstdint>

namespace bcmf::cuda {

// Cuts the memory into arrays. Without memory (null) it only finds out how many bytes they take.
class Cutter {
 public:
  explicit Cutter(void* memory) : begin_(static_cast<char*>(memory)), at_(begin_) {}
  template <typename T>
  T* take(int64_t count) {
    char* part = at_;
    at_ += (count * sizeof(T) + 15) / 16 * 16;
    return reinterpret_cast<T*>(part);
  }
  int64_t bytes() const { return at_ - begin_; }

 private:
  char *begin_, *at_;
};

}  // namespace bcmf::cuda
