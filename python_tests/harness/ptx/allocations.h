// Global memory: what was allocated, and what kernels did to it.
#pragma once

#include <cstdint>
#include <vector>

#include "races.h"

namespace ptx {

// Fresh memory is full of this byte: as floats of any size these are huge numbers, which no test takes for a result.
// (0x7f would be the largest number of bf16, with which tests fill their inputs.)
constexpr unsigned char kFresh = 0x7b;
constexpr int kSector = 32;

struct Allocation {
  uint64_t begin = 0;
  int64_t bytes = 0;
  bool tracked = false;          // it is known what is written, and looked for races
  std::vector<uint8_t> written;  // by kernels, byte by byte; empty: by none
  std::vector<LastAccess> last;  // of each byte; empty: there was none, or races are not looked for
  struct Sectors {
    std::vector<bool> read, written;  // of this launch; empty: none
  } sectors;
};

// The allocation that an instruction used last is found again without a search, as long as nothing has been released.
struct Hint {
  Allocation* allocation = nullptr;
  uint64_t releases = 0;
};

// Note memory that is new, which they fill with kFresh, or that holds something; or that it is gone.
void note_fresh(void* data, int64_t bytes);
void note_input(const void* data, int64_t bytes);
void note_release(const void* data);
bool is_noted(const void* data);

// Returns the allocation that holds all these bytes, or stops.
Allocation& find_allocation(uint64_t address, int bytes, Hint& hint);

// Stops if nothing has written an entry: no kernel, by what is noted, nor the host, by what it holds.
void check_written(const Allocation& allocation, uint64_t address, int bytes);
void mark_written(Allocation& allocation, uint64_t address, int bytes);

// The sectors that a launch touches are counted once each, those that it reads and those that it writes.
void count_sector(Allocation& allocation, uint64_t address, int bytes, Access access);
struct Traffic {
  uint64_t read = 0, written = 0;  // bytes
};
Traffic take_traffic();  // what was counted since it was last called

}  // namespace ptx
