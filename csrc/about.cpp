#include "about.h"

#include <sstream>
#include <string>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "loss_tensors.h"

namespace bcmf {
namespace {

template <size_t count>
std::string json_list(const char* const (&names)[count]) {
  std::string text;
  for (const char* name : names) text += (text.empty() ? "[\"" : ", \"") + std::string(name) + "\"";
  return text + "]";
}

// The types of the options, as schemas write them.
const char* schema_type(int64_t) { return "int"; }
const char* schema_type(bool) { return "bool"; }
const char* schema_type(double) { return "float"; }
const char* schema_type(std::optional<double>) { return "float?"; }
const char* schema_type(IntList) { return "int[]"; }
const char* schema_type(FloatList) { return "float[]"; }

std::string build_info() {
  return std::string("{\"compiler\": \"" __VERSION__ "\", \"cuda_archs\": \"" BCMF_CUDA_ARCHS
                     "\", \"cpu_capability\": \"") +
         cpu::isa().name + "\"}";
}

std::string contract() {
  std::string options;
  const auto add = [&](const auto& option) {
    options += std::string(options.empty() ? "[\"" : ", \"") + schema_type(LossOptions().*option.field) + " " +
               option.name + "\"";
  };
  std::apply([&](const auto&... option) { (add(option), ...); }, kLossOptions);
  std::ostringstream text;
  text << "{\"SUMS\": " << json_list(kSumNames) << ", \"SUMMARY\": " << json_list(kSummaryNames)
       << ", \"TERMS\": " << json_list(kTermNames) << ", \"MAX_STEPS\": " << kMaxSteps
       << ", \"LOSS_OPTIONS\": " << options << "]}";
  return text.str();
}

}  // namespace
}  // namespace bcmf

const char* bcmf_build_info() {
  static const std::string text = bcmf::build_info();
  return text.c_str();
}
const char* bcmf_contract() {
  static const std::string text = bcmf::contract();
  return text.c_str();
}
void bcmf_release_kept_memory() { bcmf::cpu::release_kept_memory(); }
