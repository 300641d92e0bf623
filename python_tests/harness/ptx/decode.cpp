// From statements to instructions: opcodes become functions, and registers, constants and addresses numbers.
#include <algorithm>
#include <cstring>
#include <map>
#include <unordered_map>
#include <utility>

#include "machine.h"

namespace ptx {
namespace {

bool starts_with(const std::string& text, const char* with) { return text.rfind(with, 0) == 0; }

int64_t round_up(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

std::vector<std::string> entries_of(const std::string& vector) {  // "{%r1, %r2}"
  return split_list(vector.substr(1, vector.size() - 2));
}

const std::map<std::string, Value> kSpecial = {
    {"%tid.x", Value::thread},      {"%ctaid.x", Value::block}, {"%nctaid.x", Value::grid_size},
    {"%ntid.x", Value::block_size}, {"%laneid", Value::lane},
};

class Decoder {
 public:
  explicit Decoder(Kernel& kernel) : kernel_(kernel), text_(kernel.text) {}

  void decode() {
    read_body(text_, kernel_.module->files);
    std::vector<int> first(text_.statements.size() + 1);  // instruction of each statement
    for (size_t i = 0; i < text_.statements.size(); ++i) {
      first[i] = static_cast<int>(kernel_.code.size());
      statement(text_.statements[i]);
    }
    first.back() = static_cast<int>(kernel_.code.size());
    static const Statement end = {"the end of the kernel", "", "ret", false, {}, 0, {}};
    Instruction exit;
    exit.flow = Flow::exit, exit.statement = &end;
    kernel_.code.push_back(exit);
    for (Instruction& in : kernel_.code)
      if (in.flow == Flow::branch) in.target = first[label(in.statement->operands[0])];
    kernel_.counts.resize(kernel_.code.size());
  }

 private:
  // -------------------------------------------------------------------------------------------------------------------
  // Operands

  size_t label(const std::string& name) const {
    const auto found = text_.labels.find(name);
    if (found == text_.labels.end()) stop("there is no label " + name + " in " + text_.name);
    return found->second;
  }

  int constant(Value value, int bytes, uint64_t bits = 0) {
    kernel_.constants.push_back({kernel_.registers, bytes, value, bits});
    return kernel_.registers++;
  }

  int width_of(const std::string& name) const {
    if (kSpecial.count(name)) return 4;
    auto found = text_.widths.find(name);
    if (found == text_.widths.end()) found = text_.widths.find(name.substr(0, name.find_first_of("0123456789")));
    if (found == text_.widths.end()) stop("there is no register " + name + " in " + text_.name);
    return found->second;
  }

  int register_of(const std::string& name) {
    const auto found = registers_.find(name);
    if (found != registers_.end()) return found->second;
    const auto special = kSpecial.find(name);
    width_of(name);
    return registers_[name] = special != kSpecial.end() ? constant(special->second, 4) : kernel_.registers++;
  }

  // "12", "-1", "0f3F800000", "0d3FF0000000000000"
  int literal(const std::string& text, int bytes) {
    const auto [found, is_new] = literals_.try_emplace({text, bytes}, kernel_.registers);
    if (!is_new) return found->second;
    const bool is_float = text.size() >= 10 && text[0] == '0' && std::strchr("fFdD", text[1]);
    if (is_float && static_cast<int>(text.size() - 2) / 2 != bytes) stop("a literal of another size: " + text);
    const uint64_t bits = is_float         ? std::stoull(text.substr(2), nullptr, 16)
                          : text[0] == '-' ? static_cast<uint64_t>(std::stoll(text, nullptr, 0))
                                           : std::stoull(text, nullptr, 0);
    return constant(Value::bits, bytes, bytes == 1 ? bits != 0 : bits);  // one byte: a predicate
  }

  // The address of a parameter or of shared memory. ptxas may place shared variables in another order.
  int symbol(const std::string& name, int bytes) {
    for (const Parameter& parameter : text_.parameters)
      if (parameter.name == name) return constant(Value::bits, bytes, parameter.offset);
    const auto& all = text_.shared.count(name) ? text_.shared : kernel_.module->shared;
    const auto found = all.find(name);
    if (found == all.end()) stop("there is no symbol " + name + " in " + text_.name);
    if (found->second.bytes == kDynamic) return constant(Value::dynamic_shared, bytes);
    const auto [placed, is_new] = shared_at_.try_emplace(name, 0);
    if (is_new) {
      placed->second = round_up(kernel_.static_shared, found->second.alignment);
      kernel_.static_shared = placed->second + found->second.bytes;
    }
    return constant(Value::bits, bytes, placed->second);
  }

  int operand(const std::string& text, int bytes) {
    if (text[0] == '%') return register_of(text);
    if (std::isdigit(static_cast<unsigned char>(text[0])) || text[0] == '-') return literal(text, bytes);
    return symbol(text, bytes);
  }

  int sized(const std::string& name, int bytes, const Statement& statement) {
    if (name[0] == '%' && width_of(name) != bytes) stop(name + " is no register of that size: " + statement.text);
    return operand(name, bytes);
  }

  void address(const std::string& text, int bytes, const Statement& statement, Instruction& in) {  // "[%rd1+8]"
    const std::string inner = text.substr(1, text.size() - 2);
    const size_t plus = inner.find('+');
    if (plus != std::string::npos) in.offset = std::stoll(inner.substr(plus + 1));
    in.from[0] = sized(inner.substr(0, plus), bytes, statement);
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Statements

  void statement(const Statement& statement) {
    Instruction in;
    in.statement = &statement;
    in.negated = statement.negated;
    if (!statement.guard.empty()) in.guard = sized(statement.guard, 1, statement);
    const std::string& opcode = statement.opcode;
    if (opcode == "bra" || opcode == "bra.uni") {
      in.flow = Flow::branch;
    } else if (opcode == "ret" || opcode == "exit") {
      in.flow = Flow::exit;
    } else if (opcode == "bar.sync") {
      if (statement.operands != std::vector<std::string>{"0"}) stop("no barrier like " + statement.text);
      in.flow = Flow::barrier;
    } else if (starts_with(opcode, "shfl.sync.")) {
      shuffle(statement, in);
    } else if (starts_with(opcode, "vote.sync.")) {
      vote(statement, in);
    } else if (starts_with(opcode, "ld.") || starts_with(opcode, "st.") || starts_with(opcode, "atom.")) {
      memory(statement, in);
    } else if (starts_with(opcode, "mov.") && statement.text.find('{') != std::string::npos) {
      vector_move(statement, in);
    } else {
      arithmetic(statement, in);
    }
    kernel_.code.push_back(in);
  }

  void shuffle(const Statement& statement, Instruction& in) {  // "shfl.sync.bfly.b32 %r1|%p1, %r2, 16, 31, -1"
    const std::vector<std::string>& operands = statement.operands;
    in.flow = Flow::shuffle;
    in.run = find_shuffle(statement.opcode);
    if (!in.run) stop("no instruction like " + statement.text);
    const size_t bar = operands[0].find('|');
    in.to[0] = sized(operands[0].substr(0, bar), 4, statement);
    if (bar != std::string::npos) in.to[1] = sized(operands[0].substr(bar + 1), 1, statement);
    for (int i = 0; i < 4; ++i) in.from[i] = sized(operands[1 + i], 4, statement);
  }

  void vote(const Statement& statement, Instruction& in) {  // "vote.sync.any.pred %p1, %p2, -1"
    const std::vector<std::string>& operands = statement.operands;
    in.flow = Flow::shuffle;
    in.run = find_shuffle(statement.opcode);
    if (!in.run || operands.size() != 3) stop("no instruction like " + statement.text);
    in.to[0] = sized(operands[0], starts_with(statement.opcode, "vote.sync.ballot.") ? 4 : 1, statement);
    in.from[0] = sized(operands[1], 1, statement);
    in.from[3] = sized(operands[2], 4, statement);
  }

  void memory(const Statement& statement, Instruction& in) {
    std::string opcode = statement.opcode;
    const size_t vector = opcode.find(".v");
    if (vector != std::string::npos) in.count = opcode[vector + 2] - '0', opcode.erase(vector, 3);
    const MemoryOpcode* found = find_memory(opcode);
    if (!found) stop("no instruction like " + statement.text);
    const bool loads = starts_with(opcode, "ld."), is_atomic = starts_with(opcode, "atom.");
    const std::vector<std::string>& operands = statement.operands;
    in.run = found->run;
    address(operands[loads || is_atomic], opcode.find(".shared") != std::string::npos ? 4 : 8, statement, in);
    if (is_atomic) {
      in.to[0] = sized(operands[0], found->bytes, statement), in.from[1] = sized(operands[2], found->bytes, statement);
      return;
    }
    const std::string& values = operands[!loads];
    const std::vector<std::string> entries = in.count > 1 ? entries_of(values) : std::vector<std::string>{values};
    if (in.count > 4 || in.count * found->bytes > 16 || static_cast<int>(entries.size()) != in.count)
      stop("no instruction like " + statement.text);
    const bool is_float = opcode[opcode.rfind('.') + 1] == 'f';
    in.width = std::max(2, found->bytes);     // there are no registers of one byte
    for (const std::string& entry : entries)  // those of integers may be wider
      if (entry[0] == '%' && !is_float) in.width = std::max(in.width, width_of(entry));
    for (int i = 0; i < in.count; ++i) (loads ? in.to[i] : in.from[1 + i]) = sized(entries[i], in.width, statement);
  }

  void vector_move(const Statement& statement, Instruction& in) {  // "mov.b64 {%r1, %r2}, %rd1", and the reverse
    const std::vector<std::string>& operands = statement.operands;
    const bool packs = operands[1][0] == '{';
    const std::vector<std::string> entries = entries_of(operands[packs]);
    const int whole = bytes_of_type(statement.opcode.substr(4));
    in.count = static_cast<int>(entries.size());
    in.run = find_vector_move(packs, whole, in.count);
    if (!in.run) stop("no instruction like " + statement.text);
    (packs ? in.to[0] : in.from[0]) = sized(operands[!packs], whole, statement);
    for (int i = 0; i < in.count; ++i)
      if (packs || entries[i] != "_") (packs ? in.from[i] : in.to[i]) = sized(entries[i], whole / in.count, statement);
  }

  void arithmetic(const Statement& statement, Instruction& in) {
    const std::vector<std::string>& operands = statement.operands;
    // nvcc also converts the lower half of a register.
    const bool of_half = statement.opcode == "cvt.s64.s32" && width_of(operands[1]) == 8;
    const Opcode* opcode = find_arithmetic(statement.opcode + (of_half ? " of b64" : ""));
    if (!opcode || operands.size() != 1 + opcode->from.size()) stop("no instruction like " + statement.text);
    in.run = opcode->run;
    in.to[0] = sized(operands[0], opcode->to, statement);
    for (size_t i = 0; i < opcode->from.size(); ++i) in.from[i] = sized(operands[1 + i], opcode->from[i], statement);
  }

  Kernel& kernel_;
  KernelText& text_;
  std::unordered_map<std::string, int> registers_;
  std::map<std::pair<std::string, int>, int> literals_;
  std::map<std::string, int64_t> shared_at_;
};

}  // namespace

void decode(Kernel& kernel) {
  if (!kernel.code.empty()) return;
  Kernel decoded;  // of its own, as one that is decoded in part must never run
  decoded.text = kernel.text, decoded.module = kernel.module;
  Decoder(decoded).decode();
  kernel = std::move(decoded);
}

}  // namespace ptx
