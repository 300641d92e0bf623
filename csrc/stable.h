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

#include <cstdint>
#include <optional>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>
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

// torch's own classes of errors are no part of the stable ABI, and so there is no TypeError. But those of the standard
// library are translated: this one becomes a ValueError.
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

inline Tensor empty(IntList sizes, const Kind& kind, MemoryFormat format = MemoryFormat::Contiguous) {
  return stable::empty(sizes, kind.type, std::nullopt, kind.device, std::nullopt, format);
}
inline Tensor zeros(IntList sizes, const Kind& kind) {
  Tensor made = empty(sizes, kind);
  return stable::zero_(made);
}

// torch's C interface has numbers of its own for dtypes and devices.
inline int32_t number_of(ScalarType type) { return stable::detail::to<int32_t>(stable::detail::from(type)); }
inline int32_t number_of(DeviceType type) { return stable::detail::to<int32_t>(stable::detail::from(type)); }

inline Tensor empty_strided(IntList sizes, IntList strides, const Kind& kind) {
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  number_of(kind.type), number_of(kind.device.type()),
                                                  kind.device.index(), &made));
  return Tensor(made);
}

// Returns a tensor without memory that has the strides of empty_like.
inline Tensor empty_like_on_meta(const Tensor& t) {
  using stable::detail::from;
  StableIValue stack[] = {
      from(t),
      from(std::optional<ScalarType>()),
      from(std::optional<torch::headeronly::Layout>()),
      from(std::optional<Device>(Device(DeviceType::Meta))),
      from(std::optional<bool>()),
      from(std::optional<MemoryFormat>(MemoryFormat::Preserve)),
  };
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack, TORCH_ABI_VERSION));
  return stable::detail::to<Tensor>(stack[0]);
}

}  // namespace bcmf
