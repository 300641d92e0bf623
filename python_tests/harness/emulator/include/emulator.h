// Runs the kernels of csrc/cuda on the CPU, compiled by g++ instead of nvcc. A CUDA thread is a fiber; blocks run one
// after the other, and a block's threads in turn, each up to its next barrier.
//
// It finds: a missing barrier (results change with the order of threads), memory that is read before it is written
// (shared memory starts as NaN), a barrier that not all threads reach, and, compiled with -fsanitize=address, every
// access out of bounds (each shared array is a heap block of its exact size).
// It does not show: races between blocks beyond their order, bank conflicts, speed.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

enum class Order { forward, reversed, shuffled };
inline Order order = Order::forward;  // the order in which blocks, and a block's threads, run

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned count() const { return x * y * z; }
  Dim3 at(unsigned i) const { return {i % x, i / x % y, i / x / y}; }
};

inline Dim3 thread_index, block_index, block_size, grid_size;

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 128 << 10;

enum class State { running, at_block_barrier, at_warp_barrier, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state;
  std::string place;           // file:line of the barrier it waits at
  uint64_t published[2];       // what it shuffled to its warp, in turns
  int turn;                    // which of the two it published last
  void* fake_stack = nullptr;  // what AddressSanitizer keeps of a fiber
};

struct Block {
  std::vector<Fiber> fibers;  // they are kept from launch to launch
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  void* scheduler_fake_stack = nullptr;
  unsigned current = 0;
  std::function<void()> kernel;
  std::map<const void*, std::unique_ptr<char[]>> shared;
  int64_t static_bytes = 0, most_static_bytes = 0;     // how large all of that is, and was in a block of the launch
  std::map<int64_t, std::unique_ptr<char[]>> dynamic;  // parts of the dynamic shared memory, by their offset
  int64_t dynamic_bytes = 0;                           // how large all of it is, as the launch said
  bool launched = false;
};
inline Block block;

// ---------------------------------------------------------------------------------------------------------------------
// Fibers

inline void enter(const Fiber& fiber, void** leaving_fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(leaving_fake_stack, fiber.stack.get(), kStackBytes);
#else
  (void)fiber, (void)leaving_fake_stack;
#endif
}

inline void leave_to_scheduler(Fiber& fiber, bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, block.scheduler_stack,
                                 block.scheduler_stack_bytes);
#else
  (void)fiber, (void)for_good;
#endif
}

inline void arrived(void* fake_stack, const void** from_stack, size_t* from_bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, from_stack, from_bytes);
#else
  (void)fake_stack, (void)from_stack, (void)from_bytes;
#endif
}

inline void fiber_main() {
  arrived(nullptr, &block.scheduler_stack, &block.scheduler_stack_bytes);
  block.kernel();
  Fiber& self = block.fibers[block.current];
  self.state = State::done;
  leave_to_scheduler(self, true);
  setcontext(&block.scheduler);
}

// Waits in the scheduler until all threads of the block, or of the warp, have come to a barrier.
inline void wait(State state, const char* file, int line) {
  Fiber& self = block.fibers[block.current];
  self.state = state;
  self.place = std::string(file) + ":" + std::to_string(line);
  leave_to_scheduler(self, false);
  swapcontext(&self.context, &block.scheduler);
  arrived(self.fake_stack, &block.scheduler_stack, &block.scheduler_stack_bytes);
}

inline void resume(unsigned thread) {
  Fiber& fiber = block.fibers[thread];
  block.current = thread;
  thread_index = block_size.at(thread);
  enter(fiber, &block.scheduler_fake_stack);
  swapcontext(&block.scheduler, &fiber.context);
  arrived(block.scheduler_fake_stack, nullptr, nullptr);
}

// ---------------------------------------------------------------------------------------------------------------------
// Blocks

inline std::vector<unsigned> permutation(unsigned count) {
  static std::mt19937 random(1);
  std::vector<unsigned> turns(count);
  std::iota(turns.begin(), turns.end(), 0);
  if (order == Order::reversed) std::reverse(turns.begin(), turns.end());
  if (order == Order::shuffled) std::shuffle(turns.begin(), turns.end(), random);
  return turns;
}

// Lets the threads [first, last) go on if all of them wait at the same barrier of this kind.
inline bool release(unsigned first, unsigned last, State barrier) {
  for (unsigned i = first; i < last; ++i) {
    const Fiber& fiber = block.fibers[i];
    if (fiber.state != barrier || fiber.place != block.fibers[first].place) return false;
  }
  for (unsigned i = first; i < last; ++i) block.fibers[i].state = State::running;
  return true;
}

[[noreturn]] inline void report_divergence(unsigned threads) {
  std::map<std::string, unsigned> places;
  for (unsigned i = 0; i < threads; ++i) {
    const Fiber& fiber = block.fibers[i];
    ++places[fiber.state == State::done ? "the end of the kernel" : fiber.place];
  }
  std::string text = "divergent barrier:";
  for (const auto& [place, count] : places) text += " " + std::to_string(count) + " threads at " + place + ",";
  text.back() = '.';
  throw std::runtime_error(text);
}

inline void run_block() {
  const unsigned threads = block_size.count();
  if (block.fibers.size() < threads) block.fibers.resize(threads);
  block.shared.clear();
  block.static_bytes = 0;
  block.dynamic.clear();
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.state = State::running;
    fiber.turn = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  const auto is = [](State state) { return [state](const Fiber& fiber) { return fiber.state == state; }; };
  const auto end = block.fibers.begin() + threads;
  while (!std::all_of(block.fibers.begin(), end, is(State::done))) {
    for (unsigned thread : permutation(threads))
      if (block.fibers[thread].state == State::running) resume(thread);
    for (unsigned first = 0; first < threads; first += kWarp)
      release(first, std::min(first + kWarp, threads), State::at_warp_barrier);
    release(0, threads, State::at_block_barrier);
    const bool stuck = std::none_of(block.fibers.begin(), end, is(State::running));
    if (stuck && !std::all_of(block.fibers.begin(), end, is(State::done))) report_divergence(threads);
  }
}

inline std::function<void()> before_launch;  // it does what other programs might do in between

inline void launch(Dim3 grid, Dim3 threads, int64_t shared, std::function<void()> kernel) {
  if (before_launch) before_launch();
  if (grid.count() == 0 || threads.count() == 0 || threads.count() > 1024)
    throw std::runtime_error("a launch of no block, no thread, or more than 1024 threads fails on CUDA");
  grid_size = grid;
  block_size = threads;
  block.kernel = std::move(kernel);
  block.dynamic_bytes = shared;
  block.most_static_bytes = 0;
  const struct Launched {  // it tidies up when the launch has ended, or failed
    Launched() { block.launched = true; }
    ~Launched() { block.launched = false; }
  } launched;
  for (unsigned index : permutation(grid.count())) {
    block_index = grid.at(index);
    run_block();
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// What kernels call

// Threads call this instead of throwing, because an exception cannot leave a fiber.
[[noreturn]] inline void stop(const char* fault) {
  std::fprintf(stderr, "%s\n", fault);
  std::abort();
}

// `count` entries of shared memory for the block. At first they are NaN, as integers a large negative number.
template <typename T>
T* poisoned(std::unique_ptr<char[]>& bytes, size_t count) {
  if (!bytes) {
    bytes.reset(new char[count * sizeof(T)]);
    memset(bytes.get(), 0xff, count * sizeof(T));
  }
  return reinterpret_cast<T*>(bytes.get());
}

template <typename T>
T* shared_array(const void* key, size_t count) {
  std::unique_ptr<char[]>& bytes = block.shared[key];
  if (!bytes) block.static_bytes += static_cast<int64_t>(count * sizeof(T));
  block.most_static_bytes = std::max(block.most_static_bytes, block.static_bytes);
  return poisoned<T>(bytes, count);
}

// Hands `value` to the other lanes of the warp, waits for theirs, and returns where they lie: as many as there are. All
// lanes of the warp must call it at the same place.
template <typename T>
std::vector<T> of_all_lanes(T value, const char* file, int line) {
  static_assert(sizeof(T) <= 8);
  Fiber& self = block.fibers[block.current];
  const int turn = self.turn ^= 1;  // the other slot may still be read by slower lanes
  memcpy(&self.published[turn], &value, sizeof(T));
  wait(State::at_warp_barrier, file, line);
  const unsigned first = block.current / kWarp * kWarp;
  std::vector<T> values(std::min(kWarp, block_size.count() - first));
  for (unsigned lane = 0; lane < values.size(); ++lane)
    memcpy(&values[lane], &block.fibers[first + lane].published[turn], sizeof(T));
  return values;
}

// The `value` of another lane, or one's own if it is not there, as CUDA gives it.
template <typename T>
T from_lane(T value, unsigned lane, const char* file, int line) {
  const std::vector<T> values = of_all_lanes(value, file, line);
  return lane < values.size() ? values[lane] : value;
}

// A bit for each lane that has a true value.
inline unsigned ballot(bool value, const char* file, int line) {
  const std::vector<char> values = of_all_lanes<char>(value, file, line);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < values.size(); ++lane) bits |= static_cast<unsigned>(values[lane]) << lane;
  return bits;
}

inline unsigned own_lane() { return block.current % kWarp; }

template <typename T>
T fetch_add(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}

}  // namespace emulator

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size

#define BCMF_SHARED(type, name, count) \
  static char name##_key;              \
  type* const name = emulator::shared_array<type>(&name##_key, (count))

#define __syncthreads() emulator::wait(emulator::State::at_block_barrier, __FILE__, __LINE__)
#define __syncwarp() emulator::wait(emulator::State::at_warp_barrier, __FILE__, __LINE__)
#define __shfl_sync(mask, value, lane) emulator::from_lane((value), (lane), __FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, bits) \
  emulator::from_lane((value), emulator::own_lane() ^ (bits), __FILE__, __LINE__)
#define __shfl_up_sync(mask, value, delta) \
  emulator::from_lane((value), emulator::own_lane() - (delta), __FILE__, __LINE__)
#define __shfl_down_sync(mask, value, delta) \
  emulator::from_lane((value), emulator::own_lane() + (delta), __FILE__, __LINE__)

#define __ballot_sync(mask, value) emulator::ballot((value), __FILE__, __LINE__)
#define __any_sync(mask, value) (emulator::ballot((value), __FILE__, __LINE__) != 0)

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> shift % 32);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) << shift % 32 >> 32);
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }

// This takes integers only, because a sum of floats would depend on the order.
inline int atomicAdd(int* address, int value) { return emulator::fetch_add(address, value); }
inline unsigned atomicAdd(unsigned* address, unsigned value) { return emulator::fetch_add(address, value); }
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  return emulator::fetch_add(address, value);
}
inline unsigned atomicOr(unsigned* address, unsigned bits) { return *address |= bits; }
