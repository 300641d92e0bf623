#include "kernels.h"

#include <map>
#include <memory>

namespace ptx {
namespace {

std::map<std::string, std::unique_ptr<Kernel>>& kernels() {
  static auto& all = *new std::map<std::string, std::unique_ptr<Kernel>>;
  return all;
}

}  // namespace

void load_module(const std::string& text) {
  auto* module = new ModuleText(read_module(text));  // kept for good, as kernels point to it
  for (KernelText& each : module->kernels) {
    auto kernel = std::make_unique<Kernel>();
    kernel->text = std::move(each);
    kernel->module = module;
    kernels()[kernel->text.name] = std::move(kernel);
  }
}

Kernel& find_kernel(const std::string& name) {
  const auto found = kernels().find(name);
  if (found == kernels().end()) stop("there is no kernel " + name);
  decode(*found->second);
  return *found->second;
}

std::vector<Kernel*> all_kernels() {
  std::vector<Kernel*> all;
  for (auto& [name, kernel] : kernels()) all.push_back(kernel.get());
  return all;
}

}  // namespace ptx
