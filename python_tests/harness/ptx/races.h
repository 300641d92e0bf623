// Who wrote and read a byte of memory last, and whether something orders that before the next access.
#pragma once

#include <cstdint>

namespace ptx {

enum class Access : uint8_t { load, store, atomic };

// The time of an access. Every stretch between two barriers of a block has a number of its own. Blocks run one after
// the other, so that those of this block begin at first_of_block, and those of this launch at first_of_launch. (To
// shared memory, a block is a launch of its own.)
struct Epoch {
  uint32_t now = 0, first_of_block = 0, first_of_launch = 0;
};

class LastAccess {
 public:
  // Whether nothing has been written since the launch began.
  bool is_fresh(const Epoch& epoch) const { return written_ < epoch.first_of_launch; }

  // Notes an access. Returns the words for the earlier access that it races with, or null.
  const char* note(Access access, uint16_t thread, const Epoch& epoch) {
    const bool both_atomic = access == Access::atomic && writer_ == kAtomic;
    if (!both_atomic && races_with(written_, writer_, thread, epoch))
      return writer_ == kAtomic ? "changed by an atomic" : "written";
    if (access == Access::load) {
      if (read_ >= epoch.first_of_launch && read_ < epoch.first_of_block) read_by_other_block_ = read_;
      reader_ = read_ == epoch.now && reader_ != thread ? kMany : thread;
      read_ = epoch.now;
      return nullptr;
    }
    if (races_with(read_, reader_, thread, epoch) || read_by_other_block_ >= epoch.first_of_launch) return "read";
    writer_ = access == Access::atomic ? kAtomic : thread;
    written_ = epoch.now;
    return nullptr;
  }

 private:
  static constexpr uint16_t kMany = 0xffff, kAtomic = 0xfffe;  // no thread

  static bool races_with(uint32_t then, uint16_t by, uint16_t thread, const Epoch& epoch) {
    return then >= epoch.first_of_launch && (then < epoch.first_of_block || (then == epoch.now && by != thread));
  }

  uint32_t written_ = 0, read_ = 0, read_by_other_block_ = 0;  // epochs; 0: never
  uint16_t writer_ = 0, reader_ = 0;
};

}  // namespace ptx
