// Helpers of all files that bind ops to torch: dtypes, views of tensors, and checks.
#pragma once

#include "common/args.h"
#include "cpu/memory.h"
#include "stable.h"

namespace bcmf {

inline FloatType float_type(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::Half:
      return FloatType::f16;
    case ScalarType::BFloat16:
      return FloatType::bf16;
    case ScalarType::Float:
      return FloatType::f32;
    case ScalarType::Double:
      return FloatType::f64;
    default:
      raise_value_error(name, " are floating point (fp16, bf16, fp32, fp64), not ", words(type), ".");
  }
}

inline LabelType label_type(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::Byte:
      return LabelType::u8;
    case ScalarType::Short:
      return LabelType::i16;
    case ScalarType::Int:
      return LabelType::i32;
    case ScalarType::Long:
      return LabelType::i64;
    default:
      raise_value_error(name, " holds class ids (uint8, int16, int32 or int64), not ", words(type), ".");
  }
}

inline MapView map_view(const Tensor& t, const char* name) {
  return {t.data_ptr(), float_type(t.scalar_type(), name), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}
inline LabelView label_view(const Tensor& t) {
  return {t.data_ptr(), label_type(t.scalar_type(), "target"), t.stride(0), t.stride(1), t.stride(2)};
}

// Makes a dense tensor that every training step makes anew. On the CPU, a large one lies in memory that is kept from
// step to step (cpu/memory.h).
inline Tensor make_dense(IntList sizes, IntList strides, const Kind& kind) {
  const uint64_t bytes = bytes_of(sizes, kind.type);
  // Of more than a pointer can reach, torch makes an error.
  const bool large = bytes >= cpu::kLarge && bytes <= INT64_MAX / 2;
  if (kind.device.type() != DeviceType::CPU || !large) return empty_strided(sizes, strides, kind);
  return stable::from_blob(cpu::allocate_large(bytes), sizes, strides, kind.device, kind.type, cpu::free_large);
}

// The same, with the sizes of another tensor, and as empty_like would lay it out.
inline Tensor make_like(const Tensor& t) {
  return is_dense(t) ? make_dense(t.sizes(), t.strides(), kind_of(t)) : stable::empty_like(t);
}

// Returns the dtype that the kernels compute in: fp64 for fp64 tensors, else fp32.
inline ScalarType acc_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool has_sizes(const Tensor& t, IntList sizes) { return t.sizes().equals(sizes); }

// The Python functions have checked all this with kinder words; these checks keep a direct call of torch.ops.bcmf
// memory-safe.
inline void check_same_device(const Tensor& first, const Tensor& other, const char* first_name, const char* name) {
  BCMF_CHECK(other.device() == first.device(), first_name, " are on ", words(first.device()), " and ", name, " on ",
             words(other.device()), ".");
}

// Tensors may have more than 2^31 entries, but the kernels count rows, columns and classes in 32 bits.
inline void check_side(int64_t side) {
  BCMF_CHECK(side < int64_t{1} << 30, "a side of ", side, " is too long: it has to be below 2^30.");
}

}  // namespace bcmf
