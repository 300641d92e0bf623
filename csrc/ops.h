// Helpers of all files that bind ops to torch: dtypes, views of tensors, and checks.
#pragma once

#include <ATen/Functions.h>
#include <torch/library.h>

#include "device/common.cuh"

namespace bcmf {

inline FloatType float_type(at::ScalarType type, const char* name) {
  switch (type) {
    case at::kHalf:
      return FloatType::f16;
    case at::kBFloat16:
      return FloatType::bf16;
    case at::kFloat:
      return FloatType::f32;
    case at::kDouble:
      return FloatType::f64;
    default:
      TORCH_CHECK_TYPE(false, name, " are floating point (fp16, bf16, fp32, fp64), not ", type, ".");
  }
}

inline LabelType label_type(at::ScalarType type, const char* name) {
  switch (type) {
    case at::kByte:
      return LabelType::u8;
    case at::kShort:
      return LabelType::i16;
    case at::kInt:
      return LabelType::i32;
    case at::kLong:
      return LabelType::i64;
    default:
      TORCH_CHECK_TYPE(false, name, " holds class ids (uint8, int16, int32 or int64), not ", type, ".");
  }
}

inline MapView map_view(const at::Tensor& t, const char* name) {
  return {t.data_ptr(), float_type(t.scalar_type(), name), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// Returns the dtype that the kernels compute in: fp64 for fp64 tensors, else fp32.
inline at::ScalarType acc_type(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The Python functions have checked all this with kinder words; these checks keep a direct call of torch.ops.bcmf
// memory-safe.
inline void check_same_device(const at::Tensor& first, const at::Tensor& other, const char* first_name,
                              const char* name) {
  TORCH_CHECK_VALUE(other.device() == first.device(), first_name, " are on ", first.device(), " and ", name, " on ",
                    other.device(), ".");
}

// Tensors may have more than 2^31 entries, but the kernels count rows, columns and classes in 32 bits.
inline void check_side(int64_t side) {
  TORCH_CHECK_VALUE(side < int64_t{1} << 30, "a side of ", side, " is too long: it has to be below 2^30.");
}

#ifdef BCMF_WITH_CUDA
void check_launch(int error);
inline at::Tensor make_scratch(const at::Tensor& t, int64_t bytes) {
  return at::empty({bytes}, t.options().dtype(at::kByte));
}
#endif

void register_lmfm_cpu(torch::Library& m);  // lmfm_ops.cpp
void register_lmfm_cuda(torch::Library& m);
void register_metrics_cpu(torch::Library& m);  // metrics_ops.cpp

}  // namespace bcmf
