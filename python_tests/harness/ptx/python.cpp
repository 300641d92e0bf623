// What Python calls, by ctypes. Errors come back as text; null is none.
#include <cstring>
#include <exception>
#include <map>
#include <sstream>
#include <string>

#include "kernels.h"

#define PTX_PYTHON extern "C" __attribute__((visibility("default")))

namespace ptx {
void forget_attributes();

namespace {

thread_local std::string answer;

template <typename F>
const char* caught(F f) {
  const std::lock_guard lock(gate());
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    answer = error.what();
    return answer.c_str();
  }
}

void write_list(std::ostream& out, const std::vector<std::string>& entries) {
  out << '[';
  for (size_t i = 0; i < entries.size(); ++i) out << (i ? ", \"" : "\"") << entries[i] << '"';
  out << ']';
}

void write_kernel(std::ostream& out, const Kernel& kernel) {
  out << "{\"name\": \"" << demangled(kernel.text.name) << "\", \"symbol\": \"" << kernel.text.name
      << "\", \"launches\": " << kernel.launches << ", \"blocks\": " << kernel.blocks
      << ", \"threads\": " << kernel.threads << ", \"static_shared\": " << kernel.static_shared
      << ", \"dynamic_shared\": " << kernel.dynamic_shared << ", \"bytes_read\": " << kernel.bytes_read
      << ", \"bytes_written\": " << kernel.bytes_written << ", \"instructions\": [";
  for (size_t i = 0; i + 1 < kernel.code.size(); ++i) {  // without the end
    const Statement& statement = *kernel.code[i].statement;
    const Count& count = kernel.counts[i];
    const auto file = kernel.module->files.find(statement.place.file);
    out << (i ? ", " : "") << "[\"" << statement.opcode << "\", \""
        << (file == kernel.module->files.end() ? "" : file->second) << "\", " << statement.place.line << ", "
        << count.executed << ", " << count.lanes << ", " << count.requests << ", " << count.sectors << ", "
        << count.passes << ']';
  }
  out << "]}";
}

}  // namespace
}  // namespace ptx

PTX_PYTHON void ptx_set(int order, int races, int traffic, int most_shared, int ulps) {
  ptx::options = {static_cast<ptx::Order>(order), races != 0, traffic != 0, most_shared, ulps};
}

PTX_PYTHON void ptx_set_usual() { ptx::options = {}; }

PTX_PYTHON const char* ptx_load(const char* text) {
  return ptx::caught([&] { ptx::load_module(text), ptx::forget_attributes(); });
}

PTX_PYTHON const char* ptx_decode_all() {
  return ptx::caught([] {
    for (ptx::Kernel* kernel : ptx::all_kernels()) ptx::find_kernel(kernel->text.name);
  });
}

// parameters: as the kernel lays them out.
PTX_PYTHON const char* ptx_run(const char* name, unsigned blocks, unsigned threads, int64_t shared,
                               const unsigned char* parameters) {
  return ptx::caught([&] {
    ptx::Kernel& kernel = ptx::find_kernel(name);
    ptx::launch(kernel, blocks, threads, shared, {parameters, parameters + kernel.text.parameter_bytes});
  });
}

PTX_PYTHON void ptx_note_fresh(void* data, int64_t bytes) { ptx::note_fresh(data, bytes); }
PTX_PYTHON void ptx_note_input(void* data, int64_t bytes) { ptx::note_input(data, bytes); }
PTX_PYTHON void ptx_note_release(void* data) { ptx::note_release(data); }

PTX_PYTHON uint64_t ptx_launches() {
  const std::lock_guard lock(ptx::gate());
  uint64_t launches = 0;
  for (const ptx::Kernel* kernel : ptx::all_kernels()) launches += kernel->launches;
  return launches;
}

PTX_PYTHON void ptx_reset_counts() {
  const std::lock_guard lock(ptx::gate());
  for (ptx::Kernel* kernel : ptx::all_kernels()) {
    kernel->counts.assign(kernel->counts.size(), {});
    kernel->launches = kernel->blocks = kernel->threads = kernel->bytes_read = kernel->bytes_written = 0;
    kernel->dynamic_shared = 0;
  }
}

// JSON of the kernels that were launched, in the order of their first launches.
PTX_PYTHON const char* ptx_counts() {
  const std::lock_guard lock(ptx::gate());
  std::map<uint64_t, const ptx::Kernel*> launched;
  for (const ptx::Kernel* kernel : ptx::all_kernels())
    if (kernel->launches > 0) launched[kernel->first_launch] = kernel;
  std::ostringstream out;
  for (const auto& [number, kernel] : launched) {
    out << (out.tellp() == 0 ? "[" : ", ");
    ptx::write_kernel(out, *kernel);
  }
  ptx::answer = launched.empty() ? "[]" : out.str() + "]";
  return ptx::answer.c_str();
}

// JSON: the opcodes that are known, those of arithmetic, then those of memory.
PTX_PYTHON const char* ptx_opcodes() {
  std::ostringstream out;
  out << '[';
  ptx::write_list(out, ptx::arithmetic_opcodes());
  out << ", ";
  ptx::write_list(out, ptx::memory_opcodes());
  out << ']';
  ptx::answer = out.str();
  return ptx::answer.c_str();
}
