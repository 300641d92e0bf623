// The tensors' memory, as the kernels' global memory; and there is no device, and no stream. This file stands in for
// csrc/cuda/device.cpp and csrc/cpu/memory.cpp.
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <new>

#include "allocations.h"
#include "cpu/memory.h"
#include "cuda/device.h"

namespace {

// torch's allocator, which notes what it allocates.
class NotingAllocator : public c10::Allocator {
 public:
  explicit NotingAllocator(c10::Allocator* usual) : usual_(usual) {}

  c10::DataPtr allocate(size_t bytes) override {
    c10::DataPtr made = usual_->allocate(bytes);
    void* data = made.get();
    if (!data) return made;
    if (made.get_context() != data)
      throw std::logic_error("torch's allocator gives memory in a way that is unknown here");
    ptx::note_fresh(data, static_cast<int64_t>(bytes));
    usual_delete_ = made.get_deleter();
    return {data, made.release_context(), &release, made.device()};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  static void release(void* data) {
    ptx::note_release(data);
    usual_delete_(data);
  }

  c10::Allocator* usual_;
  static inline c10::DeleterFnPtr usual_delete_ = nullptr;
};

const bool noting = [] {
  c10::SetCPUAllocator(new NotingAllocator(c10::GetCPUAllocator()), /*priority=*/255);
  return true;
}();

}  // namespace

namespace bcmf::cpu {

void* allocate_large(size_t bytes) {
  void* data = std::malloc(bytes);
  if (!data) throw std::bad_alloc();
  ptx::note_fresh(data, static_cast<int64_t>(bytes));
  return data;
}
void free_large(void* memory) {
  ptx::note_release(memory);
  std::free(memory);
}
void release_kept_memory() {}

}  // namespace bcmf::cpu

namespace bcmf::cuda {

Guard::Guard(const Tensor&) {}
Guard::~Guard() = default;
Stream current_stream(const Tensor&) { return nullptr; }
void check_launch(int error) { STD_TORCH_CHECK(error == 0, "a launch returned ", error); }

}  // namespace bcmf::cuda
