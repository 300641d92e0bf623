// torch, as much of it as the ops need, through LibTorch's Stable ABI, so that one library serves many releases of it.
// setup.py defines TORCH_TARGET_VERSION, the oldest of them.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace bcmf {

namespace stable = torch::stable;
using stable::Device;
using stable::Tensor;
using torch::headeronly::DeviceType;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using IntList = torch::headeronly::HeaderOnlyArrayRef<int64_t>;
using FloatList = torch::headeronly::HeaderOnlyArrayRef<double>;
using TensorList = torch::headeronly::HeaderOnlyArrayRef<Tensor>;
using OptionalTensorList = std::vector<std::optional<Tensor>>;

// ---------------------------------------------------------------------------------------------------------------------
// Errors. Their words can hold sizes, dtypes and devices.

struct SizesInWords {
  IntList sizes;
};
inline SizesInWords words(IntList sizes) { return {sizes}; }
inline std::ostream& operator<<(std::ostream& out, const SizesInWords& words) {
  out << '[';
  for (size_t i = 0; i < words.sizes.size(); ++i) out << (i ? ", " : "") << words.sizes[i];
  return out << ']';
}
inline const char* words(ScalarType type) { return torch::headeronly::toString(type); }
inline std::string words(const Device& device) {
  const DeviceType type = device.type();
  const std::string name = type == DeviceType::CPU    ? "cpu"
                           : type == DeviceType::CUDA ? "cuda"
                           : type == DeviceType::Meta ? "meta"
                                                      : "another device";
  return device.index() < 0 ? name : name + ":" + std::to_string(device.index());
}

// torch's own classes of errors are no part of the stable ABI, and so there is no TypeError and no OutOfMemoryError.
// But those of the standard library are translated: this one becomes a ValueError.
template <typename... Parts>
[[noreturn]] void raise_value_error(const Parts&... parts) {
  std::ostringstream text;
  ((text << parts), ...);
  throw std::invalid_argument(text.str());
}
#define BCMF_CHECK(condition, ...) \
  if (!(condition)) [[unlikely]]   \
  ::bcmf::raise_value_error(__VA_ARGS__)

// ---------------------------------------------------------------------------------------------------------------------
// New tensors

// What a new tensor holds, and where it lies.
struct Kind {
  ScalarType type;
  Device device;

  Kind with(ScalarType other) const { return {other, device}; }
};
inline Kind kind_of(const Tensor& t) { return {t.scalar_type(), t.device()}; }

// torch's C interface has numbers of its own for dtypes and devices.
inline int32_t number_of(ScalarType type) { return stable::detail::to<int32_t>(stable::detail::from(type)); }
inline int32_t number_of(DeviceType type) { return stable::detail::to<int32_t>(stable::detail::from(type)); }

inline size_t size_of(ScalarType type) { return aoti_torch_dtype_element_size(number_of(type)); }

// Returns the bytes of so many entries; of more than there can be, the largest number.
inline uint64_t bytes_of(IntList sizes, ScalarType type) {
  uint64_t bytes = size_of(type);
  for (const int64_t size : sizes)
    if (__builtin_mul_overflow(bytes, static_cast<uint64_t>(size), &bytes)) return UINT64_MAX;
  return bytes;
}

// torch keeps the words of its error to itself. Trainers look for "CUDA out of memory", to take smaller batches; but a
// kernel that failed earlier may show here, too.
[[noreturn]] inline void raise_no_memory(IntList sizes, const Kind& kind) {
  std::ostringstream text;
  text << (kind.device.type() == DeviceType::CUDA ? "CUDA out of memory. " : "Out of memory: ")
       << "bcmf_ext found no room for a tensor of the size " << words(sizes) << " ("
       << (bytes_of(sizes, kind.type) >> 20) << " MiB) on " << words(kind.device)
       << (kind.device.type() == DeviceType::CUDA ? ", unless a kernel has failed before." : ".");
  throw std::runtime_error(text.str());
}

// stable::empty would look its op up by name, which takes a microsecond.
inline Tensor empty_strided(IntList sizes, IntList strides, const Kind& kind) {
  AtenTensorHandle made;
  const AOTITorchError error =
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), number_of(kind.type),
                               number_of(kind.device.type()), kind.device.index(), &made);
  if (error != AOTI_TORCH_SUCCESS) raise_no_memory(sizes, kind);
  return Tensor(made);
}
inline Tensor empty(IntList sizes, const Kind& kind) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  return empty_strided(sizes, strides, kind);
}
inline Tensor zeros(IntList sizes, const Kind& kind) {
  Tensor made = empty(sizes, kind);
  return stable::zero_(made);
}

// Whether the entries of a tensor fill a piece of memory without gaps, each entry once.
inline bool is_dense(const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> axes;  // strides and sizes
  for (int64_t i = 0; i < t.dim(); ++i)
    if (t.size(i) != 1) axes.emplace_back(t.stride(i), t.size(i));
  std::sort(axes.begin(), axes.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : axes) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}
// empty_like keeps the strides of a dense tensor.
inline Tensor new_like(const Tensor& t) {
  return is_dense(t) ? empty_strided(t.sizes(), t.strides(), kind_of(t)) : stable::empty_like(t);
}

// These return the tensor itself where it is as it should be.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : stable::contiguous(t); }
inline Tensor as_contiguous(const Tensor& t, ScalarType type) {
  return as_contiguous(t.scalar_type() == type ? t : stable::to(t, type));
}

}  // namespace bcmf
