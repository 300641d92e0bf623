// All kernels that were loaded.
#pragma once

#include <mutex>
#include <string>
#include <vector>

#include "machine.h"

namespace ptx {

// One thread at a time loads, launches or counts.
inline std::recursive_mutex& gate() {
  static std::recursive_mutex mutex;
  return mutex;
}

// Takes in the kernels of a module, in the place of others of the same names.
void load_module(const std::string& text);

// Returns a kernel, decoded, or stops.
Kernel& find_kernel(const std::string& name);

std::vector<Kernel*> all_kernels();

}  // namespace ptx
