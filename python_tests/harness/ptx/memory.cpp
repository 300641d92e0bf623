// Loads, stores and atomics, in global and shared memory, and of a kernel's parameters.
#include <algorithm>
#include <cstring>
#include <map>
#include <type_traits>

#include "machine.h"

namespace ptx {
namespace {

enum class Space { global, shared, parameters };
using Addresses = std::array<uint64_t, kLanes>;

const char* verb(Access access) {
  return access == Access::load ? "a read" : access == Access::store ? "a write" : "an atomic";
}

// Notes an access of some bytes, of which `last` tells, and stops if it races with an earlier one. where: a function.
template <typename F>
void check_race(LastAccess* last, int bytes, Access access, const Warp& warp, int lane, const Epoch& epoch, F where) {
  for (int i = 0; i < bytes; ++i)
    if (const char* earlier = last[i].note(access, static_cast<uint16_t>(warp.thread(lane)), epoch))
      stop(std::string(verb(access)) + " by thread " + std::to_string(warp.thread(lane)) + " at " + where() +
           ", which another thread has " + earlier + ", and nothing orders the two");
}

// ---------------------------------------------------------------------------------------------------------------------
// Where the bytes are, once it is certain that the lane may access them

unsigned char* parameters_at(Warp& warp, uint64_t address, int bytes) {
  if (address + bytes > warp.parameters->size()) stop("a read beyond the kernel's parameters");
  return const_cast<unsigned char*>(warp.parameters->data()) + address;
}

unsigned char* shared_at(Warp& warp, int lane, uint64_t address, int bytes, Access access) {
  Block& block = *warp.block;
  const auto where = [&] { return "offset " + std::to_string(address) + " of shared memory"; };
  if (address + bytes > block.shared.size())
    stop("an access of " + std::to_string(bytes) + " bytes at " + where() + ", of which there are " +
         std::to_string(block.shared.size()));
  if (options.races) check_race(&block.last[address], bytes, access, warp, lane, block.epoch_of_shared(), where);
  return block.shared.data() + address;
}

unsigned char* global_at(Warp& warp, const Instruction& in, int lane, uint64_t address, int bytes, Access access) {
  Allocation& allocation = find_allocation(address, bytes, in.hint);
  if (access != Access::store)
    for (int i = 0; i < in.count; ++i) check_written(allocation, address + i * (bytes / in.count), bytes / in.count);
  if (access != Access::load) mark_written(allocation, address, bytes);
  if (options.races && allocation.tracked) {
    if (allocation.last.empty()) allocation.last.resize(allocation.bytes);
    const int64_t offset = static_cast<int64_t>(address - allocation.begin);
    check_race(&allocation.last[offset], bytes, access, warp, lane, warp.block->epoch, [&] {
      return "offset " + std::to_string(offset) + " of an allocation of " + std::to_string(allocation.bytes) + " bytes";
    });
  }
  if (options.traffic) count_sector(allocation, address, bytes, access);
  return reinterpret_cast<unsigned char*>(address);
}

template <Space space>
unsigned char* bytes_at(Warp& warp, const Instruction& in, int lane, uint64_t address, int bytes, Access access) {
  if (address % bytes != 0) stop("an access of " + std::to_string(bytes) + " bytes is not aligned to them");
  if constexpr (space == Space::parameters) return parameters_at(warp, address, bytes);
  if constexpr (space == Space::shared) return shared_at(warp, lane, address, bytes, access);
  if constexpr (space == Space::global) return global_at(warp, in, lane, address, bytes, access);
}

// ---------------------------------------------------------------------------------------------------------------------
// What the accesses of a warp take

// A request takes a sector for each 32 bytes that some lane touches.
void count_global(Count& count, Lanes lanes, const Addresses& at) {
  std::array<uint64_t, kLanes> sectors;  // A lane touches one: its access is aligned, and of at most 16 bytes.
  int n = 0;
  for_lanes(lanes, [&](int lane) { sectors[n++] = at[lane] / kSector; });
  std::sort(sectors.begin(), sectors.begin() + n);
  ++count.requests;
  count.sectors += std::unique(sectors.begin(), sectors.begin() + n) - sectors.begin();
}

// There are 32 banks of four bytes. Lanes that access 8 or 16 bytes each take two or four turns, a half or a quarter of
// the warp each. A turn takes as many passes as there are different words in the same bank.
void count_shared(Count& count, Lanes lanes, const Addresses& at, int bytes) {
  const int words = std::max(1, bytes / 4), together = kLanes / words;
  for (int first = 0; first < kLanes; first += together) {
    std::array<std::vector<uint64_t>, 32> banks;
    for (int lane = first; lane < first + together; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      for (int i = 0; i < words; ++i) {
        const uint64_t word = at[lane] / 4 + i;
        std::vector<uint64_t>& bank = banks[word % 32];
        if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
      }
    }
    size_t passes = 0;
    for (const auto& bank : banks) passes = std::max(passes, bank.size());
    count.requests += passes > 0;
    count.passes += passes;
  }
}

template <Space space>
Addresses addresses_of(Warp& warp, const Instruction& in, Lanes lanes, int bytes) {
  using Address = std::conditional_t<space == Space::shared, uint32_t, uint64_t>;
  Addresses at;
  const Address* base = warp.values<Address>(in.from[0]);
  for_lanes(lanes, [&](int lane) { at[lane] = static_cast<Address>(base[lane] + in.offset); });
  if (options.traffic && space == Space::global) count_global(warp.count(in), lanes, at);
  if (options.traffic && space == Space::shared) count_shared(warp.count(in), lanes, at, bytes);
  return at;
}

// ---------------------------------------------------------------------------------------------------------------------
// The opcodes

// A register of `width` bytes may be wider than the entry, which is then extended by its sign or by zeros.
template <typename T>
void put(Register& to, int lane, int width, T value) {
  using Extended = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
  const auto extended = static_cast<Extended>(value);
  std::memcpy(to.bytes + lane * width, &extended, width);
}
template <typename T>
T get(Register& from, int lane, int width) {
  T value;
  std::memcpy(&value, from.bytes + lane * width, sizeof(T));
  return value;
}

template <Space space, typename T>
void load(Warp& warp, const Instruction& in, Lanes lanes) {
  const Addresses at = addresses_of<space>(warp, in, lanes, sizeof(T) * in.count);
  for_lanes(lanes, [&](int lane) {
    const unsigned char* from = bytes_at<space>(warp, in, lane, at[lane], in.count * sizeof(T), Access::load);
    for (int i = 0; i < in.count; ++i) {
      T value;
      std::memcpy(&value, from + i * sizeof(T), sizeof(T));
      put<T>(warp.registers[in.to[i]], lane, in.width, value);
    }
  });
}

template <Space space, typename T>
void store(Warp& warp, const Instruction& in, Lanes lanes) {
  const Addresses at = addresses_of<space>(warp, in, lanes, sizeof(T) * in.count);
  for_lanes(lanes, [&](int lane) {
    unsigned char* to = bytes_at<space>(warp, in, lane, at[lane], in.count * sizeof(T), Access::store);
    for (int i = 0; i < in.count; ++i) {
      const T value = get<T>(warp.registers[in.from[1 + i]], lane, in.width);
      std::memcpy(to + i * sizeof(T), &value, sizeof(T));
    }
  });
}

template <Space space, typename T, typename F>
void atomic(Warp& warp, const Instruction& in, Lanes lanes) {
  const Addresses at = addresses_of<space>(warp, in, lanes, sizeof(T));
  for_lanes(lanes, [&](int lane) {
    unsigned char* data = bytes_at<space>(warp, in, lane, at[lane], sizeof(T), Access::atomic);
    T before;
    std::memcpy(&before, data, sizeof(T));
    const T after = F()(before, warp.values<T>(in.from[1])[lane]);
    std::memcpy(data, &after, sizeof(T));
    warp.values<T>(in.to[0])[lane] = before;
  });
}

std::map<std::string, MemoryOpcode> table;  // by opcode, without the number of entries

template <Space space, typename T>
void define_access(const std::string& name, const std::string& type) {
  table["ld." + name + type] = {load<space, T>, sizeof(T)};
  if (space != Space::parameters) table["st." + name + type] = {store<space, T>, sizeof(T)};
}

template <Space space>
void define_space(const std::string& name) {
  define_access<space, uint8_t>(name, "u8"), define_access<space, int8_t>(name, "s8");
  define_access<space, uint16_t>(name, "u16"), define_access<space, int16_t>(name, "s16");
  define_access<space, uint32_t>(name, "u32"), define_access<space, int32_t>(name, "s32");
  define_access<space, uint64_t>(name, "u64"), define_access<space, int64_t>(name, "s64");
  define_access<space, uint32_t>(name, "f32"), define_access<space, uint64_t>(name, "f64");
  define_access<space, uint8_t>(name, "b8"), define_access<space, uint16_t>(name, "b16");
  define_access<space, uint32_t>(name, "b32"), define_access<space, uint64_t>(name, "b64");
}

template <Space space, typename T, typename F>
void define_atomic(const std::string& name, F) {
  table["atom." + name] = {atomic<space, T, F>, sizeof(T)};
}

void define_all() {
  define_space<Space::global>("global."), define_space<Space::shared>("shared."),
      define_space<Space::parameters>("param.");
  define_access<Space::global, uint32_t>("", "f32");  // a generic address: no kernel makes one of shared memory
  const auto sum = [](auto a, auto b) { return a + b; };
  const auto either = [](auto a, auto b) { return a | b; };
  define_atomic<Space::global, uint64_t>("global.add.u64", sum);
  define_atomic<Space::shared, uint32_t>("shared.add.u32", sum);
  define_atomic<Space::shared, uint32_t>("shared.or.b32", either);
}

}  // namespace

const MemoryOpcode* find_memory(const std::string& opcode) {
  if (table.empty()) define_all();
  const auto found = table.find(opcode);
  return found == table.end() ? nullptr : &found->second;
}

std::vector<std::string> memory_opcodes() {
  if (table.empty()) define_all();
  std::vector<std::string> names;
  for (const auto& [name, opcode] : table) names.push_back(name);
  return names;
}

}  // namespace ptx
