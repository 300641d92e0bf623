#include "program.h"

#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <sstream>

namespace ptx {
namespace {

std::string trim(const std::string& text) {
  const size_t first = text.find_first_not_of(" \t\r\n"), last = text.find_last_not_of(" \t\r\n");
  return first == std::string::npos ? "" : text.substr(first, last - first + 1);
}

bool starts_with(const std::string& text, const char* with) { return text.rfind(with, 0) == 0; }

std::string without_comment(const std::string& line) { return trim(line.substr(0, line.find("//"))); }

// ".shared .align 4 .b8 name[8];", or without the 8 if it is the dynamic shared memory
void read_shared(const std::string& line, std::map<std::string, SharedVariable>& to) {
  const std::vector<std::string> words = words_of(line.substr(0, line.find(';')));
  const std::string& name = words.back();
  const size_t bracket = name.find('['), end = name.find(']');
  if (bracket == std::string::npos) stop("a shared variable that is no array is unknown here: " + line);
  SharedVariable variable = {kDynamic, 1};
  for (size_t i = 0; i + 1 < words.size(); ++i)
    if (words[i] == ".align") variable.alignment = std::stoll(words[i + 1]);
  if (end > bracket + 1) variable.bytes = std::stoll(name.substr(bracket + 1));
  to[name.substr(0, bracket)] = variable;
}

// ".file 1 "name", time, size", ".loc 1 45 9, function_name …"
void read_file(const std::string& line, std::map<int, std::string>& to) {
  const size_t quote = line.find('"');
  to[std::stoi(words_of(line)[1])] = line.substr(quote + 1, line.find('"', quote + 1) - quote - 1);
}
// Of a function of the toolkit's, the place where it is called.
Place read_place(const std::string& line, const std::map<int, std::string>& files) {
  const std::vector<std::string> words = words_of(line);
  const auto file = files.find(std::stoi(words[1]));
  const bool own = file == files.end() || file->second.find("/include/") == std::string::npos;
  const auto caller = std::find(words.begin(), words.end(), "inlined_at");
  if (own || caller == words.end()) return {std::stoi(words[1]), std::stoi(words[2])};
  return {std::stoi(caller[1]), std::stoi(caller[2])};
}

// ".reg .b32 %r<9>;", ".reg .b16 %low, %high;"
void read_registers(const std::string& line, std::map<std::string, int>& to) {
  const std::vector<std::string> words = words_of(line.substr(0, line.find(';')));
  const int bytes = bytes_of_type(words[1].substr(1));
  const size_t names = line.find(words[1]) + words[1].size();
  for (const std::string& name : split_list(line.substr(names, line.find(';') - names)))
    to[name.substr(0, name.find('<'))] = bytes;
}

// ".param .align 8 .b8 name[400]", ".param .u64 .ptr .align 1 name"
void read_parameter(const std::string& text, KernelText& kernel) {
  const std::vector<std::string> words = words_of(text);
  std::string name = words.back();
  size_t alignment = 0, bytes = 0;
  bool points = false;  // what follows .ptr tells of what it points to
  for (size_t i = 0; i + 1 < words.size(); ++i) {
    points |= words[i] == ".ptr";
    if (points || words[i] == ".param") continue;
    if (words[i] == ".align")
      alignment = std::stoul(words[++i]);
    else
      bytes = bytes_of_type(words[i].substr(1));
  }
  const size_t bracket = name.find('[');
  if (bracket != std::string::npos) bytes *= std::stoul(name.substr(bracket + 1)), name.resize(bracket);
  if (alignment == 0) alignment = bytes;
  const size_t offset = (kernel.parameter_bytes + alignment - 1) / alignment * alignment;
  kernel.parameters.push_back({name, offset, bytes});
  kernel.parameter_bytes = offset + bytes;
}

void read_head(KernelText& kernel) {
  const std::string& head = kernel.head;
  const size_t open = head.find('('), close = head.find(')');
  kernel.name = trim(head.substr(head.find(".entry") + 6, open - head.find(".entry") - 6));
  for (const std::string& parameter : split_list(head.substr(open + 1, close - open - 1)))
    read_parameter(parameter, kernel);
  const size_t most = head.find(".maxntid");
  if (most != std::string::npos) kernel.max_threads = static_cast<unsigned>(std::stoul(head.substr(most + 8)));
}

Statement read_statement(const std::string& text, int line, Place place) {
  Statement found;
  found.text = text, found.line = line, found.place = place;
  std::string rest = text;
  if (rest[0] == '@') {
    const size_t space = rest.find_first_of(" \t");
    found.negated = rest[1] == '!';
    found.guard = rest.substr(found.negated ? 2 : 1, space - (found.negated ? 2 : 1));
    rest = trim(rest.substr(space));
  }
  const size_t space = rest.find_first_of(" \t");
  found.opcode = rest.substr(0, space);
  if (space != std::string::npos) found.operands = split_list(rest.substr(space));
  return found;
}

}  // namespace

std::vector<std::string> split_list(const std::string& text) {
  std::vector<std::string> parts;
  std::string part;
  int depth = 0;
  for (const char c : text) {
    depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (c == ',' && depth == 0)
      parts.push_back(trim(part)), part.clear();
    else
      part += c;
  }
  if (!trim(part).empty()) parts.push_back(trim(part));
  return parts;
}

std::vector<std::string> words_of(const std::string& text, char between) {
  std::string spaced = text;
  std::replace(spaced.begin(), spaced.end(), between, ' ');
  std::istringstream in(spaced);
  std::vector<std::string> words;
  for (std::string word; in >> word;) words.push_back(word);
  return words;
}

std::string demangled(const std::string& name) {
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> found(abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status),
                                                          std::free);
  return status == 0 ? found.get() : name;
}

int bytes_of_type(const std::string& type) {
  if (type == "pred") return 1;
  const size_t digit = type.find_first_of("0123456789");
  if (digit == std::string::npos) stop("the type " + type + " is unknown here");
  return std::stoi(type.substr(digit)) / 8;
}

// nvcc writes a statement to a line. What it writes otherwise, such as the names in .debug_str, is passed over.
ModuleText read_module(const std::string& text) {
  ModuleText module;
  std::istringstream in(text);
  std::string raw;
  int number = 0;
  const auto next = [&] { return ++number, static_cast<bool>(std::getline(in, raw)); };
  while (next()) {
    const std::string line = without_comment(raw);
    if (starts_with(line, ".target")) {
      module.generation = std::stoi(line.substr(line.find("sm_") + 3));
    } else if (starts_with(line, ".file")) {
      read_file(line, module.files);
    } else if (line.find(".shared ") != std::string::npos) {
      read_shared(line, module.shared);
    } else if (line.find(".entry") != std::string::npos) {
      KernelText kernel;
      do kernel.head += without_comment(raw) + " ";
      while (raw.find('{') == std::string::npos && next());
      kernel.first_line = number;
      for (int64_t depth = 1; next();) {
        depth += std::count(raw.begin(), raw.end(), '{') - std::count(raw.begin(), raw.end(), '}');
        if (depth == 0) break;
        kernel.body += raw + "\n";
      }
      read_head(kernel);
      module.kernels.push_back(std::move(kernel));
    }
  }
  return module;
}

// nvcc drops half of a register by "{ .reg .b16 tmp; mov.b32 {tmp, %rs1}, %r1; }", which is given here without the
// outer braces; an entry "_" of the vector means the same.
std::string without_dropped(const std::string& line) {
  constexpr char declared[] = ".reg .b16 tmp;";
  if (!starts_with(line, declared) || line.size() == sizeof(declared) - 1) return line;
  std::string rest = trim(line.substr(sizeof(declared) - 1));
  const size_t at = rest.find("tmp");
  if (!starts_with(rest, "mov.b32 {") || at == std::string::npos) stop("a scope like { " + line + " } is unknown here");
  return rest.replace(at, 3, "_");
}

void read_body(KernelText& kernel, const std::map<int, std::string>& files) {
  std::istringstream in(kernel.body);
  std::string raw;
  Place place;
  for (int number = kernel.first_line + 1; std::getline(in, raw); ++number) {
    std::string line = without_comment(raw);
    if (line == "{" || line == "}") continue;  // a scope
    if (!line.empty() && line[0] == '{' && line.back() == '}')
      line = without_dropped(trim(line.substr(1, line.size() - 2)));  // of asm
    if (line.empty() || starts_with(line, ".pragma")) continue;
    if (line.back() == ':') {
      kernel.labels[line.substr(0, line.size() - 1)] = kernel.statements.size();
    } else if (words_of(line)[0] == ".loc") {
      const Place found = read_place(line, files);
      if (found.line > 0) place = found;
    } else if (starts_with(line, ".reg")) {
      if (line.find(';') + 1 != line.size()) stop("more than a declaration in " + line + ", in " + kernel.name);
      read_registers(line, kernel.widths);
    } else if (starts_with(line, ".shared")) {
      read_shared(line, kernel.shared);
    } else if (line[0] == '.') {
      stop("the directive " + line + " is unknown here, in " + kernel.name);
    } else {
      for (size_t begin = 0, end; (end = line.find(';', begin)) != std::string::npos; begin = end + 1)
        kernel.statements.push_back(read_statement(trim(line.substr(begin, end - begin)), number, place));
    }
  }
}

}  // namespace ptx
