// Runs the blocks of a launch one after the other, and the warps of a block each up to its next barrier.
#include <algorithm>
#include <bit>
#include <cstring>
#include <map>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>

#include "machine.h"

namespace ptx {

Options options;

namespace {

thread_local const Warp* running = nullptr;

std::string place_of(const Warp& warp) {
  const Statement& statement = *warp.running->statement;
  const auto& files = warp.kernel->module->files;
  const auto file = files.find(statement.place.file);
  std::string text = "\n  in " + demangled(warp.kernel->text.name) + ", block " + std::to_string(warp.block->index) +
                     ", warp " + std::to_string(warp.index) + "\n  at line " + std::to_string(statement.line) +
                     " of the PTX: " + statement.text;
  if (file != files.end()) text += "\n  of " + file->second + ":" + std::to_string(statement.place.line);
  return text;
}

// ---------------------------------------------------------------------------------------------------------------------
// Opcodes that move registers between lanes, or several to one

Lanes lanes_where(const Predicate* values) {
  Lanes lanes = 0;
  for (int lane = 0; lane < kLanes; ++lane) lanes |= static_cast<Lanes>(values[lane] != 0) << lane;
  return lanes;
}

enum class From { butterfly, up, down, index };

template <From mode>
void shuffle(Warp& warp, const Instruction& in, Lanes lanes) {
  uint32_t before[kLanes];
  std::memcpy(before, warp.values<uint32_t>(in.from[0]), sizeof(before));
  for_lanes(lanes, [&](int lane) {
    const int b = static_cast<int>(warp.values<uint32_t>(in.from[1])[lane] & 31);
    const int c = static_cast<int>(warp.values<uint32_t>(in.from[2])[lane]);
    const int segment = c >> 8 & 31, first = lane & segment, clamp = first | (c & 31 & ~segment);
    const int source = mode == From::butterfly ? lane ^ b
                       : mode == From::up      ? lane - b
                       : mode == From::down    ? lane + b
                                               : first | (b & ~segment);
    const bool in_segment = mode == From::up ? source >= clamp : source <= clamp;
    const int from = in_segment ? source : lane;
    const Lanes mask = warp.values<Lanes>(in.from[3])[lane];
    if (!(mask >> lane & 1)) stop("lane " + std::to_string(lane) + " shuffles, and its mask does not name it");
    if (!((lanes & mask) >> from & 1))
      stop("a shuffle reads lane " + std::to_string(from) + ", which takes no part in it");
    warp.values<uint32_t>(in.to[0])[lane] = before[from];
    if (in.to[1] >= 0) warp.values<Predicate>(in.to[1])[lane] = in_segment;
  });
}

// A vote among the lanes, all of which run it together.
template <typename Result>
void vote(Warp& warp, const Instruction& in, Lanes lanes, Result (*result)(Lanes yes, Lanes lanes)) {
  const Lanes yes = lanes_where(warp.values<Predicate>(in.from[0])) & lanes;
  for_lanes(lanes, [&](int lane) {
    if (!(warp.values<Lanes>(in.from[3])[lane] >> lane & 1))
      stop("lane " + std::to_string(lane) + " votes, and its mask does not name it");
    warp.values<Result>(in.to[0])[lane] = result(yes, lanes);
  });
}
void ballot(Warp& warp, const Instruction& in, Lanes lanes) {
  vote<Lanes>(warp, in, lanes, [](Lanes yes, Lanes) { return yes; });
}
void any(Warp& warp, const Instruction& in, Lanes lanes) {
  vote<Predicate>(warp, in, lanes, [](Lanes yes, Lanes) { return Predicate(yes != 0); });
}
void all(Warp& warp, const Instruction& in, Lanes lanes) {
  vote<Predicate>(warp, in, lanes, [](Lanes yes, Lanes lanes) { return Predicate(yes == lanes); });
}

template <typename Whole, typename Part>
void pack(Warp& warp, const Instruction& in, Lanes lanes) {
  for_lanes(lanes, [&](int lane) {
    Part parts[sizeof(Whole) / sizeof(Part)];
    for (int i = 0; i < in.count; ++i) parts[i] = warp.values<Part>(in.from[i])[lane];
    std::memcpy(&warp.values<Whole>(in.to[0])[lane], parts, sizeof(Whole));
  });
}
template <typename Whole, typename Part>
void unpack(Warp& warp, const Instruction& in, Lanes lanes) {
  for_lanes(lanes, [&](int lane) {
    Part parts[sizeof(Whole) / sizeof(Part)];
    std::memcpy(parts, &warp.values<Whole>(in.from[0])[lane], sizeof(Whole));
    for (int i = 0; i < in.count; ++i)
      if (in.to[i] >= 0) warp.values<Part>(in.to[i])[lane] = parts[i];
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// A warp

class WarpRunner {
 public:
  explicit WarpRunner(Warp& warp) : warp_(warp), code_(warp.kernel->code) {}

  // Until all lanes wait at a barrier, or have come to the end.
  void run() {
    while (true) {
      const Lanes ready = warp_.alive & ~warp_.at_barrier & ~warp_.at_shuffle;
      if (ready != 0)
        run_lowest(ready);
      else if (warp_.at_shuffle != 0)
        run_shuffle();
      else
        return;
    }
  }

 private:
  void move(Lanes lanes, int to) {
    for (; lanes; lanes &= lanes - 1) warp_.at[std::countr_zero(lanes)] = to;
  }
  Lanes lanes_at(Lanes among, int place) const {
    Lanes found = 0;
    for (; among; among &= among - 1)
      if (warp_.at[std::countr_zero(among)] == place) found |= among & -among;
    return found;
  }
  static Lanes lanes_with(const Lanes* masks, Lanes mask, Lanes among) {
    Lanes found = 0;
    for (; among; among &= among - 1)
      if (masks[std::countr_zero(among)] == mask) found |= among & -among;
    return found;
  }
  void count(int place, Lanes lanes) {
    Count& count = warp_.kernel->counts[place];
    ++count.executed;
    count.lanes += std::popcount(lanes);
  }

  // Runs the lanes of the lowest place, until they part, wait, end, or come to where others are.
  void run_lowest(Lanes ready) {
    int at = INT32_MAX, next = INT32_MAX;
    for (Lanes left = ready; left; left &= left - 1) at = std::min(at, warp_.at[std::countr_zero(left)]);
    const Lanes lanes = lanes_at(ready, at);
    for (Lanes left = ready & ~lanes; left; left &= left - 1) next = std::min(next, warp_.at[std::countr_zero(left)]);
    while (at < next) {
      const Instruction& in = code_[at];
      warp_.running = &in;
      Lanes on = lanes;
      if (in.guard >= 0) {
        const Lanes set = lanes_where(warp_.values<Predicate>(in.guard));
        on &= in.negated ? ~set : set;
      }
      if (in.flow != Flow::shuffle) count(at, on);
      switch (in.flow) {
        case Flow::next:
          if (on) in.run(warp_, in, on);
          ++at;
          continue;
        case Flow::branch:
          if (on == 0 || on == lanes) {
            at = on ? in.target : at + 1;
            continue;
          }
          move(on, in.target), move(lanes & ~on, at + 1);
          return;
        case Flow::exit:
          move(lanes & ~on, at + 1);
          warp_.alive &= ~on;
          return;
        case Flow::barrier:
          if (on != lanes) stop("a barrier under a predicate that some lanes do not have");
          move(lanes, at);
          warp_.at_barrier |= lanes;
          return;
        case Flow::shuffle:
          if (on != lanes) stop("a shuffle under a predicate that some lanes do not have");
          move(lanes, at);
          warp_.at_shuffle |= lanes;
          return;
      }
    }
    move(lanes, at);
  }

  // All lanes that can come have come: those at one shuffle with one mask go on, if they are all that it names.
  void run_shuffle() {
    for (Lanes left = warp_.at_shuffle; left;) {
      const int at = warp_.at[std::countr_zero(left)];
      const Instruction& in = code_[at];
      warp_.running = &in;
      const Lanes* masks = warp_.values<Lanes>(in.from[3]);
      const Lanes mask = masks[std::countr_zero(left)], lanes = lanes_with(masks, mask, lanes_at(left, at));
      left &= ~lanes;
      if (mask & ~lanes) continue;
      count(at, lanes);
      in.run(warp_, in, lanes);
      move(lanes, at + 1);
      warp_.at_shuffle &= ~lanes;
      return;
    }
    stop("a shuffle waits for lanes that do not come");
  }

  Warp& warp_;
  const std::vector<Instruction>& code_;
};

// ---------------------------------------------------------------------------------------------------------------------
// A launch

std::vector<unsigned> in_turn(unsigned count) {
  static std::mt19937 random(0);
  std::vector<unsigned> turns(count);
  std::iota(turns.begin(), turns.end(), 0u);
  if (options.order == Order::reversed) std::reverse(turns.begin(), turns.end());
  if (options.order == Order::shuffled) std::shuffle(turns.begin(), turns.end(), random);
  return turns;
}

Lanes lanes_of(unsigned warp, unsigned threads) {
  const unsigned count = threads - warp * kLanes;
  return count >= kLanes ? kAllLanes : (1u << count) - 1;
}

class Launch {
 public:
  Launch(Kernel& kernel, unsigned blocks, unsigned threads, int64_t dynamic_shared,
         const std::vector<unsigned char>& parameters)
      : kernel_(kernel), blocks_(blocks), threads_(threads), first_dynamic_((kernel.static_shared + 15) / 16 * 16) {
    block_.shared.resize(first_dynamic_ + dynamic_shared);
    if (options.races) block_.last.resize(block_.shared.size());
    block_.epoch.first_of_launch = epoch_ + 1;
    warps_.resize((threads + kLanes - 1) / kLanes);
    for (unsigned i = 0; i < warps_.size(); ++i) {
      Warp& warp = warps_[i];
      warp.index = i, warp.kernel = &kernel, warp.block = &block_, warp.parameters = &parameters;
      warp.registers.resize(kernel.registers);
    }
    for (Warp& warp : warps_)
      for (const Constant& constant : kernel.constants)
        for (int lane = 0; lane < kLanes; ++lane) set(warp, constant, lane);
  }

  void run() {
    for (const unsigned block : in_turn(blocks_)) run_block(block);
  }

 private:
  void set(Warp& warp, const Constant& constant, int lane) {
    const uint64_t value = value_of(constant, warp, lane);
    std::memcpy(warp.registers[constant.at].bytes + lane * constant.bytes, &value, constant.bytes);
  }
  uint64_t value_of(const Constant& constant, const Warp& warp, int lane) const {
    switch (constant.value) {
      case Value::bits:
        return constant.bits;
      case Value::dynamic_shared:
        return first_dynamic_;
      case Value::grid_size:
        return blocks_;
      case Value::block_size:
        return threads_;
      case Value::block:
        return block_.index;
      case Value::thread:
        return warp.thread(lane);
      case Value::lane:
        return lane;
    }
    return 0;
  }

  void run_block(unsigned index) {
    block_.index = index;
    std::fill(block_.shared.begin(), block_.shared.end(), 0xff);  // NaN, as floats
    block_.epoch.now = block_.epoch.first_of_block = ++epoch_;
    for (Warp& warp : warps_) {
      warp.alive = lanes_of(warp.index, threads_);
      warp.at.fill(0);
      for (const Constant& constant : kernel_.constants)
        if (constant.value == Value::block)
          for (int lane = 0; lane < kLanes; ++lane) set(warp, constant, lane);
    }
    do
      for (const unsigned i : in_turn(warps_.size())) {
        running = &warps_[i];
        WarpRunner(warps_[i]).run();
      }
    while (pass_barrier());
  }

  // Lets all threads of the block go on, or returns false at the end of the kernel.
  bool pass_barrier() {
    if (std::all_of(warps_.begin(), warps_.end(), [](const Warp& warp) { return warp.alive == 0; })) return false;
    block_.epoch.now = ++epoch_;
    const int place = waits_at();
    for (Warp& warp : warps_) {
      running = &warp;
      if (warp.at_barrier != lanes_of(warp.index, threads_)) stop("a barrier that not all threads of the block reach");
      for (Lanes left = warp.at_barrier; left; left &= left - 1)
        if (warp.at[std::countr_zero(left)] != place) stop("threads wait at different barriers");
      warp.at_barrier = 0;
      warp.at.fill(place + 1);
    }
    return true;
  }
  int waits_at() const {  // the place of some thread
    for (const Warp& warp : warps_)
      if (warp.at_barrier) return warp.at[std::countr_zero(warp.at_barrier)];
    return 0;
  }

  static inline uint32_t epoch_ = 0;

  Kernel& kernel_;
  unsigned blocks_, threads_;
  int64_t first_dynamic_;
  Block block_;
  std::vector<Warp> warps_;
};

}  // namespace

void stop(const std::string& what) {
  const Warp* warp = std::exchange(running, nullptr);
  throw std::runtime_error("ptx: " + what + (warp && warp->running ? place_of(*warp) : ""));
}

Run find_shuffle(const std::string& opcode) {
  const std::map<std::string, Run> table = {{"shfl.sync.bfly.b32", shuffle<From::butterfly>},
                                            {"shfl.sync.up.b32", shuffle<From::up>},
                                            {"shfl.sync.down.b32", shuffle<From::down>},
                                            {"shfl.sync.idx.b32", shuffle<From::index>},
                                            {"vote.sync.ballot.b32", ballot},
                                            {"vote.sync.any.pred", any},
                                            {"vote.sync.all.pred", all}};
  const auto found = table.find(opcode);
  return found == table.end() ? nullptr : found->second;
}

Run find_vector_move(bool packs, int bytes, int entries) {
  if (bytes == 8 && entries == 2) return packs ? pack<uint64_t, uint32_t> : unpack<uint64_t, uint32_t>;
  if (bytes == 8 && entries == 4) return packs ? pack<uint64_t, uint16_t> : unpack<uint64_t, uint16_t>;
  if (bytes == 4 && entries == 2) return packs ? pack<uint32_t, uint16_t> : unpack<uint32_t, uint16_t>;
  return nullptr;
}

void launch(Kernel& kernel, unsigned blocks, unsigned threads, int64_t dynamic_shared,
            const std::vector<unsigned char>& parameters) {
  if (threads > kernel.text.max_threads)
    stop(demangled(kernel.text.name) + " is launched with more threads than its __launch_bounds__ allow");
  take_traffic();  // of a launch that was stopped
  Launch(kernel, blocks, threads, dynamic_shared, parameters).run();
  running = nullptr;
  const Traffic traffic = take_traffic();
  static uint64_t launches = 0;
  ++launches;
  if (kernel.launches == 0) kernel.first_launch = launches;
  ++kernel.launches, kernel.blocks += blocks, kernel.threads += uint64_t{threads} * blocks;
  kernel.bytes_read += traffic.read, kernel.bytes_written += traffic.written;
  kernel.dynamic_shared = std::max(kernel.dynamic_shared, dynamic_shared);
}

}  // namespace ptx
