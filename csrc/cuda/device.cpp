#include "cuda/device.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace bcmf::cuda {

Guard::Guard(const Tensor& t) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_device_guard(t.get_device_index(), &handle_));
}
Guard::~Guard() { aoti_torch_delete_device_guard(handle_); }

// The function that tells the stream is part of libtorch_cuda.so, which a torch without CUDA does not have. It is
// looked up instead of linked, so that the same library loads with such a torch, too.
Stream current_stream(const Tensor& t) {
  using GetStream = AOTITorchError (*)(int32_t device, void** stream);
  static const GetStream get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(get_stream, "bcmf_ext: this torch does not tell its current CUDA stream; use impl='triton'.");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get_stream(t.get_device_index(), &stream));
  return static_cast<Stream>(stream);
}

void check_launch(int error) {
  STD_TORCH_CHECK(error == 0, "bcmf_ext: a CUDA kernel did not start (", error_text(error),
                  "); python -m bcmf_ext.info says for which GPUs this build was made.");
}

}  // namespace bcmf::cuda
