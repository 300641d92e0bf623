// Who read, wrote and changed a byte of memory last, and whether something orders that before the next access.
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

// The last accesses of a kind. Of several threads in the same epoch, and of several blocks, it is known that there
// were several.
class LastThreads {
 public:
  bool races_with(uint16_t thread, const Epoch& epoch) const {
    const bool of_this_block = epoch_ == epoch.now && thread_ != thread;
    const bool of_other_block = epoch_ >= epoch.first_of_launch && epoch_ < epoch.first_of_block;
    return of_this_block || of_other_block || before_this_block_ >= epoch.first_of_launch;
  }
  void note(uint16_t thread, const Epoch& epoch) {
    if (epoch_ < epoch.first_of_block && epoch_ >= epoch.first_of_launch) before_this_block_ = epoch_;
    thread_ = epoch_ == epoch.now && thread_ != thread ? kSeveral : thread;
    epoch_ = epoch.now;
  }

 private:
  static constexpr uint16_t kSeveral = 0xffff;  // no thread

  uint32_t epoch_ = 0, before_this_block_ = 0;  // 0: never
  uint16_t thread_ = 0;
};

class LastAccess {
 public:
  // Notes an access. Returns the word for the earlier access that it races with, or null. Atomics do not race with each
  // other.
  const char* note(Access access, uint16_t thread, const Epoch& epoch) {
    if (stores_.races_with(thread, epoch)) return "written";
    if (access != Access::atomic && atomics_.races_with(thread, epoch)) return "changed by an atomic";
    if (access != Access::load && loads_.races_with(thread, epoch)) return "read";
    (access == Access::load ? loads_ : access == Access::store ? stores_ : atomics_).note(thread, epoch);
    return nullptr;
  }

 private:
  LastThreads loads_, stores_, atomics_;
};

}  // namespace ptx
