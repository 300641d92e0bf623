// What runs PTX on the CPU: the 32 lanes of a warp at a time, each with a program counter of its own. Lanes at the same
// instruction run it together; of several places the lowest one goes on first, so that lanes meet again behind a
// branch.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "allocations.h"
#include "program.h"

namespace ptx {

constexpr int kLanes = 32;
using Lanes = uint32_t;  // a bit for each lane
constexpr Lanes kAllLanes = 0xffffffffu;

struct alignas(64) Register {  // of all lanes, entries of the register's type side by side
  unsigned char bytes[kLanes * 8];
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(bytes);
  }
};
using Predicate = uint8_t;  // 0 or 1

struct Warp;
struct Instruction;
using Run = void (*)(Warp&, const Instruction&, Lanes);

enum class Flow : uint8_t { next, branch, exit, barrier, shuffle };  // shuffle: or a vote

// A statement, ready to run. Registers are numbers in the kernel; -1: none.
struct Instruction {
  Run run = nullptr;
  Flow flow = Flow::next;
  bool negated = false;  // of the guard
  int guard = -1;
  std::array<int, 4> to = {-1, -1, -1, -1};
  std::array<int, 5> from = {-1, -1, -1, -1, -1};
  int count = 1;       // of a vector's entries
  int width = 0;       // the bytes of the registers that are loaded or stored
  int64_t offset = 0;  // beside the address
  int target = -1;     // of a branch
  const Statement* statement = nullptr;
  mutable Hint hint;  // where its last access of global memory was
};

// What was counted of an instruction. In global memory a request is one execution of it, and its sectors are those of
// 32 bytes that the lanes touch; in shared memory a request is what its banks could do at once, and passes is how often
// they had to.
struct Count {
  uint64_t executed = 0, lanes = 0, requests = 0, sectors = 0, passes = 0;
};

enum class Value : uint8_t { bits, dynamic_shared, grid_size, block_size, block, thread, lane };
struct Constant {  // a register that an instruction reads and none writes
  int at;
  int bytes;
  Value value;
  uint64_t bits;
};

struct Kernel {
  KernelText text;
  const ModuleText* module = nullptr;
  std::vector<Instruction> code;  // empty until it is decoded
  std::vector<Constant> constants;
  int registers = 0;
  int64_t static_shared = 0;
  // What was counted of all launches.
  std::vector<Count> counts;  // by instruction
  uint64_t first_launch = 0;  // a number that grows from launch to launch
  uint64_t launches = 0, blocks = 0, threads = 0, bytes_read = 0, bytes_written = 0;
  int64_t dynamic_shared = 0;  // the most
};

void decode(Kernel& kernel);

// The opcodes that arithmetic.cpp defines, each a function of a lane's registers.
struct Opcode {
  Run run;
  int to;                 // bytes of the result
  std::vector<int> from;  // bytes of the operands
};
const Opcode* find_arithmetic(const std::string& opcode);
std::vector<std::string> arithmetic_opcodes();

// The opcodes of memory.cpp, without their .v2 or .v4.
struct MemoryOpcode {
  Run run;
  int bytes;  // of an entry
};
const MemoryOpcode* find_memory(const std::string& opcode);
std::vector<std::string> memory_opcodes();

// Those of execute.cpp; null: unknown. A shuffle's mask of lanes, or a vote's, is from[3]. A vector's move packs
// entries into a register, or unpacks them.
Run find_shuffle(const std::string& opcode);
Run find_vector_move(bool packs, int bytes, int entries);

struct Block {
  unsigned index = 0;
  std::vector<unsigned char> shared;
  std::vector<LastAccess> last;  // access of each byte of it
  Epoch epoch;

  Epoch epoch_of_shared() const { return {epoch.now, epoch.first_of_block, epoch.first_of_block}; }
};

struct Warp {
  std::vector<Register> registers;
  std::array<int, kLanes> at = {};
  Lanes alive = 0, at_barrier = 0, at_shuffle = 0;
  unsigned index = 0;
  Kernel* kernel = nullptr;
  Block* block = nullptr;
  const std::vector<unsigned char>* parameters = nullptr;
  const Instruction* running = nullptr;

  template <typename T>
  T* values(int number) {
    return registers[number].as<T>();
  }
  unsigned thread(int lane) const { return index * kLanes + lane; }
  Count& count(const Instruction& in) { return kernel->counts[&in - kernel->code.data()]; }
};

// Calls f(lane) for each of the lanes.
template <typename F>
inline void for_lanes(Lanes lanes, F f) {
  if (lanes == kAllLanes) {
#pragma GCC ivdep
    for (int lane = 0; lane < kLanes; ++lane) f(lane);
  } else {
    for (; lanes; lanes &= lanes - 1) f(__builtin_ctz(lanes));
  }
}

enum class Order { forward, reversed, shuffled };

struct Options {
  Order order = Order::forward;    // of blocks, and of the warps of a block
  bool races = true;               // accesses that nothing orders are looked for
  bool traffic = false;            // sectors and banks are counted
  int64_t most_shared = 99 << 10;  // bytes of a block, as of compute capability 8.6, 8.9 and 12.0
  int ulps = 0;                    // what ex2.approx and rcp.approx are off by at most, in units of the last place
};
extern Options options;

// Runs all blocks, one after the other. parameters: as the kernel reads them.
void launch(Kernel& kernel, unsigned blocks, unsigned threads, int64_t dynamic_shared,
            const std::vector<unsigned char>& parameters);

}  // namespace ptx
