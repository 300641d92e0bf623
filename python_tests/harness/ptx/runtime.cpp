// The functions of the CUDA runtime that nvcc's host code calls. So launches are what they are on a GPU: the launchers'
// own grids, blocks and shared memory, and parameters as the host lays them out.
#include <cuda_runtime_api.h>
#include <fatbinary_section.h>

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "kernels.h"

namespace {

constexpr int64_t kUsualShared = 48 << 10;  // bytes that a block gets unasked

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
thread_local std::vector<Configuration> configurations;

std::map<const void*, std::string>& names() {  // of the kernels, by the host's function
  static auto& all = *new std::map<const void*, std::string>;
  return all;
}
std::map<std::string, int64_t>& allowed() {  // dynamic shared memory, as set by cudaFuncSetAttribute
  static auto& all = *new std::map<std::string, int64_t>;
  return all;
}

ptx::Kernel& kernel_of(const void* function) { return ptx::find_kernel(names().at(function)); }

void check_configuration(const ptx::Kernel& kernel, dim3 grid, dim3 block, size_t shared) {
  const std::string name = ptx::demangled(kernel.text.name);
  if (grid.x == 0 || block.x == 0) ptx::stop(name + " is launched without blocks or threads");
  if (grid.y * grid.z * block.y * block.z != 1) ptx::stop(name + " is launched with axes that are unknown here");
  const auto asked = allowed().find(kernel.text.name);
  const int64_t most = asked == allowed().end() ? kUsualShared - kernel.static_shared : asked->second;
  if (static_cast<int64_t>(shared) > most)
    ptx::stop(name + " is launched with " + std::to_string(shared) + " bytes of dynamic shared memory, beyond the " +
              std::to_string(most) + " that it may have" +
              (asked == allowed().end() ? " without cudaFuncAttributeMaxDynamicSharedMemorySize" : ""));
}

}  // namespace

namespace ptx {
void forget_attributes() { allowed().clear(); }
}  // namespace ptx

extern "C" {

// The object files hold their PTX as text (nvcc --no-compress).
void** __cudaRegisterFatBinary(void* wrapper) {
  const std::lock_guard lock(ptx::gate());
  struct Header {
    uint32_t magic;
    uint16_t version, bytes;
    uint64_t content;
  };
  const auto* data = reinterpret_cast<const char*>(static_cast<const __fatBinC_Wrapper_t*>(wrapper)->data);
  const auto* header = reinterpret_cast<const Header*>(data);
  const std::string content(data, header->bytes + header->content);
  const size_t begin = content.find(".version");
  if (begin == std::string::npos) ptx::stop("an object file holds no PTX as text");
  ptx::load_module(content.c_str() + begin);
  return nullptr;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  names()[function] = name;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration& last = configurations.back();
  *grid = last.grid, *block = last.block, *shared = last.shared, *static_cast<void**>(stream) = last.stream;
  configurations.pop_back();
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t function, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
  const std::lock_guard lock(ptx::gate());
  ptx::Kernel& kernel = kernel_of(function);
  check_configuration(kernel, grid, block, shared);
  std::vector<unsigned char> parameters(kernel.text.parameter_bytes);
  for (size_t i = 0; i < kernel.text.parameters.size(); ++i) {
    const ptx::Parameter& parameter = kernel.text.parameters[i];
    std::memcpy(parameters.data() + parameter.offset, arguments[i], parameter.bytes);
  }
  ptx::launch(kernel, grid.x, block.x, static_cast<int64_t>(shared), parameters);
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }  // errors are exceptions
const char* cudaGetErrorString(cudaError_t) { return "no error"; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMaxSharedMemoryPerBlockOptin) ptx::stop("a device attribute that is unknown here");
  return *value = static_cast<int>(ptx::options.most_shared), cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  const std::lock_guard lock(ptx::gate());
  const ptx::Kernel& kernel = kernel_of(function);
  attributes->sharedSizeBytes = kernel.static_shared;
  attributes->maxThreadsPerBlock = static_cast<int>(kernel.text.max_threads);
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const std::lock_guard lock(ptx::gate());
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) ptx::stop("an attribute that is unknown here");
  const ptx::Kernel& kernel = kernel_of(function);
  if (value + kernel.static_shared > ptx::options.most_shared)
    ptx::stop(ptx::demangled(kernel.text.name) + " asks for more shared memory than a block can have");
  allowed()[kernel.text.name] = value;
  return cudaSuccess;
}
}
