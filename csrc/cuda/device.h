// What the ops on CUDA need of the device. A program that runs the kernels without a GPU links functions of its own in
// the place of device.cpp.
#pragma once

#include "cuda/stream.h"
#include "stable.h"

namespace bcmf::cuda {

// Makes the device of a tensor the current one as long as it lives.
class Guard {
 public:
  explicit Guard(const Tensor& t);
  ~Guard();
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;

 private:
  DeviceGuardHandle handle_ = nullptr;
};

// Returns torch's current stream on the device of a tensor.
Stream current_stream(const Tensor& t);

// Raises RuntimeError if a launcher returned an error.
void check_launch(int error);

inline Tensor make_scratch(const Tensor& t, int64_t bytes) { return empty({bytes}, kind_of(t).with(ScalarType::Byte)); }

}  // namespace bcmf::cuda
