#include "cpu/isa.h"

#include <cstdlib>
#include <string>

namespace bcmf::cpu {

#if defined(__x86_64__)
namespace {

// torch tells its choice to Python and to ATen alone, so that this is its rule once more; a test compares both.
std::string capability() {
  const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string name = asked ? asked : "";
  const bool fma = __builtin_cpu_supports("fma");
  const bool avx512 = fma && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq");
  if (name == "avx512" || name == "avx2" || name == "default") return name;
  return avx512 ? "avx512" : fma && __builtin_cpu_supports("avx2") ? "avx2" : "default";
}

}  // namespace
#endif

const Isa& isa() {
#if defined(__x86_64__)
  static const std::string chosen = capability();
  if (chosen == "avx512") return avx512::isa;
  if (chosen == "avx2") return avx2::isa;
#endif
  return baseline::isa;
}

}  // namespace bcmf::cpu
