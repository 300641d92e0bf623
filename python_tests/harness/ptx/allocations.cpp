#include "allocations.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "program.h"

namespace ptx {
namespace {

// They are never destroyed, because tensors may outlive everything else at the end of a program.
struct Allocations {
  std::mutex mutex;
  std::map<uint64_t, std::unique_ptr<Allocation>> by_begin;
  std::atomic<uint64_t> releases = 0;
  std::vector<Allocation*> touched;  // by the launch whose sectors are counted
};
Allocations& allocations = *new Allocations;

bool holds(const Allocation& allocation, uint64_t address, int bytes) {
  return address >= allocation.begin && address + bytes <= allocation.begin + allocation.bytes;
}

uint64_t address_of(const void* data) { return reinterpret_cast<uint64_t>(data); }

[[noreturn]] void stop_out_of_bounds(const Allocation* before, uint64_t address, int bytes) {
  std::string text = "an access of " + std::to_string(bytes) + " bytes of global memory ";
  if (before && address < before->begin + before->bytes + (1 << 20))
    text += "at offset " + std::to_string(address - before->begin) + " of an allocation of " +
            std::to_string(before->bytes) + " bytes";
  else
    text += "where nothing is allocated";
  stop(text);
}

// Memory beyond this is address space, as tests of large strides ask for, and lies where the system has no such memory.
constexpr int64_t kMostTracked = 1 << 30;

void note(const void* data, int64_t bytes, bool tracked) {
  const std::lock_guard lock(allocations.mutex);
  auto made = std::make_unique<Allocation>();
  made->begin = address_of(data), made->bytes = bytes, made->tracked = tracked;
  allocations.by_begin[made->begin] = std::move(made);
  ++allocations.releases;  // what was there before may not have been released by note_release
}

}  // namespace

void note_fresh(void* data, int64_t bytes) {
  if (bytes <= kMostTracked) std::memset(data, kFresh, bytes);
  note(data, bytes, bytes <= kMostTracked);
}
void note_input(const void* data, int64_t bytes) { note(data, bytes, false); }

bool is_noted(const void* data) {
  const std::lock_guard lock(allocations.mutex);
  return allocations.by_begin.count(address_of(data)) > 0;
}

void note_release(const void* data) {
  const std::lock_guard lock(allocations.mutex);
  ++allocations.releases;
  allocations.by_begin.erase(address_of(data));
}

Allocation& find_allocation(uint64_t address, int bytes, Hint& hint) {
  if (hint.allocation && hint.releases == allocations.releases && holds(*hint.allocation, address, bytes))
    return *hint.allocation;
  const std::lock_guard lock(allocations.mutex);
  auto after = allocations.by_begin.upper_bound(address);
  Allocation* found = after == allocations.by_begin.begin() ? nullptr : std::prev(after)->second.get();
  if (!found || !holds(*found, address, bytes)) stop_out_of_bounds(found, address, bytes);
  hint = {found, allocations.releases};
  return *found;
}

// An entry that holds what fresh memory holds may have been written by the host, if it is one or two bytes long. Then
// the eight bytes around it tell.
void check_written(const Allocation& allocation, uint64_t address, int bytes) {
  const auto is_fresh = [](const unsigned char* data, int64_t count) {
    return std::all_of(data, data + count, [](unsigned char byte) { return byte == kFresh; });
  };
  if (!allocation.tracked || !is_fresh(reinterpret_cast<const unsigned char*>(address), bytes)) return;
  const int64_t offset = static_cast<int64_t>(address - allocation.begin);
  if (!allocation.written.empty() && allocation.written[offset]) return;
  if (bytes < 4) {
    const int64_t first = offset / 8 * 8, count = std::min<int64_t>(8, allocation.bytes - first);
    if (!is_fresh(reinterpret_cast<const unsigned char*>(allocation.begin + first), count)) return;
  }
  stop("a read of what nothing has written, at offset " + std::to_string(offset) + " of an allocation of " +
       std::to_string(allocation.bytes) + " bytes");
}

void mark_written(Allocation& allocation, uint64_t address, int bytes) {
  if (!allocation.tracked) return;
  if (allocation.written.empty()) allocation.written.resize(allocation.bytes);
  std::fill_n(allocation.written.begin() + static_cast<int64_t>(address - allocation.begin), bytes, true);
}

void count_sector(Allocation& allocation, uint64_t address, int bytes, Access access) {
  auto& [read, written] = allocation.sectors;
  if (read.empty()) {
    const uint64_t sectors = (allocation.begin + allocation.bytes - 1) / kSector - allocation.begin / kSector + 1;
    read.resize(sectors), written.resize(sectors);
    allocations.touched.push_back(&allocation);
  }
  const uint64_t first = allocation.begin / kSector;
  for (uint64_t sector = address / kSector; sector <= (address + bytes - 1) / kSector; ++sector) {
    if (access != Access::store) read[sector - first] = true;
    if (access != Access::load) written[sector - first] = true;
  }
}

Traffic take_traffic() {
  Traffic total;
  for (Allocation* allocation : allocations.touched) {
    auto& [read, written] = allocation->sectors;
    total.read += kSector * std::count(read.begin(), read.end(), true);
    total.written += kSector * std::count(written.begin(), written.end(), true);
    allocation->sectors = {};
  }
  allocations.touched.clear();
  return total;
}

}  // namespace ptx
