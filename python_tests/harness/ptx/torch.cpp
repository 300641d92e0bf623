// The tensors' memory, as the kernels' global memory. This file stands in for csrc/cpu/memory.cpp.
#include <ATen/record_function.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <string_view>
#include <vector>

#include "allocations.h"
#include "cpu/memory.h"

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

// What an op is called with may lie elsewhere: in memory of NumPy's, or in a storage that Python made.
struct Foreign : at::ObserverContext {
  std::vector<const void*> noted;
};

void note_foreign(const c10::IValue& value, Foreign& foreign) {
  if (value.isList()) {
    for (const c10::IValue entry : value.toList()) note_foreign(entry, foreign);
  } else if (value.isTensor() && value.toTensor().has_storage()) {
    const c10::Storage& storage = value.toTensor().storage();
    const bool fake = !storage.data();  // then its size may be a symbol, which cannot be asked for
    if (fake || storage.nbytes() == 0 || ptx::is_noted(storage.data())) return;
    ptx::note_input(storage.data(), static_cast<int64_t>(storage.nbytes()));
    foreign.noted.push_back(storage.data());
  }
}

std::unique_ptr<at::ObserverContext> begin_op(const at::RecordFunction& op) {
  if (std::string_view(op.name()).rfind("bcmf_ptx::", 0) != 0) return nullptr;
  auto foreign = std::make_unique<Foreign>();
  for (const c10::IValue& input : op.inputs()) note_foreign(input, *foreign);
  return foreign;
}
void end_op(const at::RecordFunction&, at::ObserverContext* context) {
  if (auto* foreign = static_cast<Foreign*>(context))
    for (const void* data : foreign->noted) ptx::note_release(data);
}

const bool noting = [] {
  c10::SetCPUAllocator(new NotingAllocator(c10::GetCPUAllocator()), /*priority=*/255);
  at::addGlobalCallback(
      at::RecordFunctionCallback(begin_op, end_op).needsInputs(true).scopes({at::RecordScope::FUNCTION}));
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
