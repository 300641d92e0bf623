// PTX as text: the kernels of a module, and their statements one by one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace ptx {

// Raises std::runtime_error, with the place in the kernel that runs.
[[noreturn]] void stop(const std::string& what);

struct Place {  // in the CUDA source
  int file = 0, line = 0;
};

struct Statement {
  std::string text;  // all of it
  std::string guard, opcode;
  bool negated = false;  // of the guard
  std::vector<std::string> operands;
  int line = 0;  // of the PTX
  Place place;
};

struct Parameter {
  std::string name;
  size_t offset, bytes;
};

struct SharedVariable {
  int64_t bytes, alignment;  // bytes of dynamic shared memory: kDynamic
};
constexpr int64_t kDynamic = -1;

struct KernelText {
  std::string name, head, body;
  int first_line = 0;  // of the body, in the PTX
  std::vector<Parameter> parameters;
  size_t parameter_bytes = 0;
  unsigned max_threads = 1024;
  std::map<std::string, int> widths;             // bytes of a register, by its name or by the name's letters
  std::map<std::string, SharedVariable> shared;  // the kernel's own
  std::map<std::string, size_t> labels;          // the index of the statement that follows
  std::vector<Statement> statements;
};

struct ModuleText {
  int generation = 0;  // 80, of .target sm_80
  std::vector<KernelText> kernels;
  std::map<std::string, SharedVariable> shared;
  std::map<int, std::string> files;  // of the CUDA source
};

// Takes a module apart into kernels. Their statements are read by read_body, when they are needed.
ModuleText read_module(const std::string& text);
void read_body(KernelText& kernel, const std::map<int, std::string>& files);

// Splits at commas that are not within braces or brackets, and trims the parts.
std::vector<std::string> split_list(const std::string& text);
std::vector<std::string> words_of(const std::string& text, char between = ' ');

// Returns the name of a kernel as C++ has it.
std::string demangled(const std::string& name);

// Returns the size of a type such as f32, b64 or pred.
int bytes_of_type(const std::string& type);

}  // namespace ptx
