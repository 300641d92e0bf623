// Faults, one of each kind that the executor claims to find, and each with its mended twin. nvcc compiles them into the
// library, where planted_run runs one; g++ compiles the same file over the emulator into a program: `planted FAULT`
// tells whether it notices. test_ptx.py does both.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <string>
#include <vector>

#include "cuda/start.cuh"

#if defined(__CUDACC__)
extern "C" void ptx_note_fresh(void* data, int64_t bytes);
extern "C" void ptx_note_input(void* data, int64_t bytes);
extern "C" void ptx_note_release(void* data);
#else
inline void ptx_note_fresh(void*, int64_t) {}
inline void ptx_note_input(void*, int64_t) {}
inline void ptx_note_release(void*) {}
#endif

namespace {

constexpr int kThreads = 64;
constexpr int kBytes = kThreads * static_cast<int>(sizeof(float));

// Global memory of the GPU: 0, 1, 2, …, or nothing yet. It is given room for accesses beyond its end, so that these
// hurt nobody.
struct Memory {
  float* data = static_cast<float*>(std::aligned_alloc(64, 4 * kBytes));
  bool released = false;

  explicit Memory(bool filled) {
    if (!filled) ptx_note_fresh(data, kBytes);
    if (filled) ptx_note_input(data, kBytes);
    for (int i = 0; filled && i < kThreads; ++i) data[i] = static_cast<float>(i);
  }
  ~Memory() {
    if (!released) ptx_note_release(data);
    std::free(data);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
};

// What a fault is planted into. The host says whether it is; a kernel that should have given 0, 1, 2, … is wrong if it
// gives something else.
struct Test {
  bool planted;
  Memory in{true}, out{false};

  bool holds() const {
    for (int i = 0; i < kThreads; ++i)
      if (out.data[i] != static_cast<float>(i)) return false;
    return true;
  }
};

template <typename... Parameters, typename... Arguments>
void start(void (*kernel)(Parameters...), int64_t shared, const Arguments&... arguments) {
  bcmf::launch(kernel, 1, kThreads, shared, nullptr, arguments...);
}

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory

__global__ void mirror_twice(const float* in, float* out, bool planted) {
  BCMF_SHARED(float, tile, kThreads);
  tile[threadIdx.x] = 0;
  __syncthreads();
  tile[threadIdx.x] = in[kThreads - 1 - threadIdx.x];
  if (!planted) __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}
void missing_barrier(Test& test) { start(mirror_twice, 0, test.in.data, test.out.data, test.planted); }

__global__ void wait_for_half(float* out, bool planted) {
  if (!planted || threadIdx.x < kThreads / 2) __syncthreads();
  out[threadIdx.x] = static_cast<float>(threadIdx.x);
}
void divergent_barrier(Test& test) { start(wait_for_half, 0, test.out.data, test.planted); }

__global__ void count_atomically(float* out, bool planted) {
  BCMF_SHARED(unsigned, count, 1);
  if (threadIdx.x == 0) count[0] = 0;
  __syncthreads();
  atomicAdd(count, 1u);
  if (!planted) __syncthreads();
  out[threadIdx.x] = count[0] == kThreads ? static_cast<float>(threadIdx.x) : -1;
}
void missing_barrier_behind_atomics(Test& test) { start(count_atomically, 0, test.out.data, test.planted); }

__global__ void reset_beside_atomics(float* out, bool planted) {
  BCMF_SHARED(unsigned, any, 1);
  if (threadIdx.x == 0) any[0] = 0;
  if (!planted) __syncthreads();
  atomicOr(any, 1u);
  __syncthreads();
  out[threadIdx.x] = any[0] ? static_cast<float>(threadIdx.x) : -1;
}
void missing_barrier_before_atomics(Test& test) { start(reset_beside_atomics, 0, test.out.data, test.planted); }

__global__ void copy_through_dynamic(const float* in, float* out) {
  float* tile = bcmf::device::dynamic_shared<float>(0, kThreads);
  tile[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = tile[threadIdx.x];
}
void shared_memory_asked_too_small(Test& test) {
  start(copy_through_dynamic, kBytes - 4 * test.planted, test.in.data, test.out.data);
}

template <bool kPlanted>
__global__ void copy_through_much(const float* in, float* out) {
  float* tile = bcmf::device::dynamic_shared<float>(60 << 10, kThreads);
  tile[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = tile[threadIdx.x];
}
constexpr int64_t kMuch = (60 << 10) + kBytes;
void attribute_not_set(Test& test) {
#if defined(__CUDACC__)
  if (test.planted) copy_through_much<true><<<1, kThreads, kMuch>>>(test.in.data, test.out.data);
  if (test.planted) return;
#endif
  start(copy_through_much<false>, kMuch, test.in.data, test.out.data);
}
void more_shared_memory_than_there_is(Test& test) {
  start(copy_through_much<false>, test.planted ? 100 << 10 : kMuch, test.in.data, test.out.data);
}

__global__ void copy_pairs_through_dynamic(const float* in, float* out, int64_t offset) {
  struct alignas(8) Pair {
    float entries[2];
  };
  Pair* tile = bcmf::device::dynamic_shared<Pair>(offset, kThreads);
  tile[threadIdx.x] = {in[threadIdx.x], 1};
  const Pair pair = tile[threadIdx.x];
  out[threadIdx.x] = pair.entries[0] * pair.entries[1];
}
void misaligned_shared_access(Test& test) {
  start(copy_pairs_through_dynamic, 2 * kBytes + 8, test.in.data, test.out.data, int64_t{test.planted ? 4 : 8});
}

// ---------------------------------------------------------------------------------------------------------------------
// Global memory

__global__ void copy(const float* in, float* out, int first) { out[threadIdx.x] = in[first + threadIdx.x] - first; }
void read_out_of_bounds(Test& test) {
  test.in.data[kThreads] = kThreads;
  start(copy, 0, test.in.data, test.out.data, test.planted ? 1 : 0);
}

__global__ void copy_to(const float* in, float* out, int first) {
  out[threadIdx.x] = in[threadIdx.x];
  if (threadIdx.x == kThreads - 1) out[threadIdx.x + first] = in[threadIdx.x];
}
void write_out_of_bounds(Test& test) { start(copy_to, 0, test.in.data, test.out.data, test.planted ? 1 : 0); }

void use_after_release(Test& test) {
  if (test.planted) ptx_note_release(test.in.data);
  test.in.released = test.planted;
  start(copy, 0, test.in.data, test.out.data, 0);
}

__global__ void add_nothing(const float* in, const float* nothing, float* out) {
  out[threadIdx.x] = in[threadIdx.x] + 0 * nothing[threadIdx.x];
}
void uninitialised_read(Test& test) {
  Memory scratch(false);
  if (!test.planted) start(copy, 0, test.in.data, scratch.data, 0);
  std::memset(scratch.data + kThreads / 2, 0, kBytes / 2);  // the other half
  start(add_nothing, 0, test.in.data, scratch.data, test.out.data);
}

__global__ void copy_pairs(const float* in, float* out) {
  struct alignas(8) Pair {
    float first, second;
  };
  const Pair pair = *reinterpret_cast<const Pair*>(in + threadIdx.x / 2 * 2);
  out[threadIdx.x] = threadIdx.x % 2 ? pair.second : pair.first;
}
void misaligned_vector_load(Test& test) {
  Memory shifted(true);
  for (int i = 0; i < kThreads; ++i) shifted.data[i + 1] = static_cast<float>(i);
  start(copy_pairs, 0, test.planted ? shifted.data + 1 : test.in.data, test.out.data);
}

__global__ void write_by_blocks(const float* in, float* out, int blocks_apart) {
  out[threadIdx.x + blockIdx.x * blocks_apart] = in[threadIdx.x + blockIdx.x * blocks_apart];
}
void race_between_blocks(Test& test) {
  bcmf::launch(write_by_blocks, 2, kThreads / 2, 0, nullptr, test.in.data, test.out.data,
               kThreads / 2 - (test.planted ? 1 : 0));
  test.out.data[kThreads - 1] = kThreads - 1;
}

__global__ void read_what_another_wrote(const float* in, float* out, bool planted) {
  if (blockIdx.x == 0 || !planted)
    out[kThreads / 2 * blockIdx.x + threadIdx.x] = in[kThreads / 2 * blockIdx.x + threadIdx.x];
  if (blockIdx.x == 1 && planted) out[kThreads / 2 + threadIdx.x] = out[threadIdx.x] + kThreads / 2;
}
void read_of_another_blocks_result(Test& test) {
  bcmf::launch(read_what_another_wrote, 2, kThreads / 2, 0, nullptr, test.in.data, test.out.data, test.planted);
}

__global__ void overwrite_what_another_read(float* in, float* out, bool planted) {
  out[kThreads / 2 * blockIdx.x + threadIdx.x] = in[kThreads / 2 * blockIdx.x + threadIdx.x];
  if (blockIdx.x == 1 && planted) in[threadIdx.x] = in[threadIdx.x] + 1;
}
void overwritten_input_of_another_block(Test& test) {
  Memory scratch(false);
  start(copy, 0, test.in.data, scratch.data, 0);
  bcmf::launch(overwrite_what_another_read, 2, kThreads / 2, 0, nullptr, scratch.data, test.out.data, test.planted);
}

__global__ void copy_twice(const float* in, float* scratch, float* out, bool planted) {
  scratch[kThreads - 1 - threadIdx.x] = in[kThreads - 1 - threadIdx.x];
  if (!planted) __syncthreads();
  out[threadIdx.x] = scratch[threadIdx.x];
}
void race_between_threads(Test& test) {
  Memory scratch(false);
  start(copy, 0, test.in.data, scratch.data, 0);
  start(copy_twice, 0, test.in.data, scratch.data, test.out.data, test.planted);
}

// ---------------------------------------------------------------------------------------------------------------------
// Warps, launches, and what g++ does not see

__global__ void shuffle_in_half(const float* in, float* out, bool planted) {
  float value = in[threadIdx.x];
  if (!planted || threadIdx.x % 32 < 16)
    value = __shfl_xor_sync(0xffffffffu, __shfl_xor_sync(0xffffffffu, value, 8), 8);
  out[threadIdx.x] = value;
}
void shuffle_under_divergence(Test& test) { start(shuffle_in_half, 0, test.in.data, test.out.data, test.planted); }

__global__ void shuffle_from_beyond(const float* in, float* out, unsigned lanes, int delta) {
  float value = in[threadIdx.x];
  if (lanes >> threadIdx.x % 32 & 1) value = __shfl_down_sync(lanes, value, delta);
  out[threadIdx.x] = value;
}
void shuffle_from_a_lane_that_is_not_there(Test& test) {
  start(shuffle_from_beyond, 0, test.in.data, test.out.data, test.planted ? 0xffffu : 0xffffffffu,
        test.planted ? 8 : 0);
}

__global__ void shuffle_by_masks(const float* in, float* out, bool planted) {
  float value = in[threadIdx.x];
  const unsigned half = threadIdx.x % 32 < 16 ? 0xffffu : 0xffff0000u;
  const unsigned mask = planted && threadIdx.x % 2 ? 0xffffffffu : half;  // lanes of one half that disagree
  value = __shfl_xor_sync(mask, __shfl_xor_sync(half, value, 8), 8);
  out[threadIdx.x] = value;
}
void shuffle_of_other_masks(Test& test) { start(shuffle_by_masks, 0, test.in.data, test.out.data, test.planted); }

struct Arguments {
#if defined(__CUDA_ARCH__)
  int64_t only_on_the_device;
#endif
  bcmf::LossArgs args;
};
struct SameArguments {
  bcmf::LossArgs args;
};
template <typename T>
__global__ void write_total(T arguments) {
  static_cast<float*>(arguments.args.total)[threadIdx.x] = static_cast<float>(threadIdx.x);
}
void disagreement_about_arguments(Test& test) {
  bcmf::LossArgs args = {};
  args.total = test.out.data;
  struct {
    Arguments arguments;
    int64_t room;
  } planted = {};
  planted.arguments.args = args;
  if (test.planted)
    start(write_total<Arguments>, 0, planted.arguments);
  else
    start(write_total<SameArguments>, 0, SameArguments{args});
}

__device__ float only_right_on_the_host(float x) {
#if defined(__CUDA_ARCH__)
  return 2 * x;
#else
  return x;
#endif
}
__global__ void by_arch(const float* in, float* out, bool planted) {
  out[threadIdx.x] = planted ? only_right_on_the_host(in[threadIdx.x]) : in[threadIdx.x];
}
void fault_in_a_branch_for_the_device(Test& test) { start(by_arch, 0, test.in.data, test.out.data, test.planted); }

__global__ void __launch_bounds__(kThreads / 2) copy_by_few(const float* in, float* out, int times) {
  for (int i = threadIdx.x; i < kThreads; i += kThreads / times) out[i] = in[i];
}
void more_threads_than_launch_bounds(Test& test) {
  const int times = test.planted ? 1 : 2;
  bcmf::launch(copy_by_few, 1, kThreads / times, 0, nullptr, test.in.data, test.out.data, times);
}

__global__ void divide(const float* in, float* out, int by) {
  const int quotient = (static_cast<int>(threadIdx.x) + 1) / by;
  out[threadIdx.x] = quotient == -1 ? -1 : in[threadIdx.x];
}
void division_by_zero(Test& test) { start(divide, 0, test.in.data, test.out.data, test.planted ? 0 : 1); }

#define FAULT(name) {#name, name}
const std::map<std::string, void (*)(Test&)> faults = {FAULT(missing_barrier),
                                                       FAULT(divergent_barrier),
                                                       FAULT(missing_barrier_before_atomics),
                                                       FAULT(missing_barrier_behind_atomics),
                                                       FAULT(shared_memory_asked_too_small),
                                                       FAULT(attribute_not_set),
                                                       FAULT(more_shared_memory_than_there_is),
                                                       FAULT(misaligned_shared_access),
                                                       FAULT(read_out_of_bounds),
                                                       FAULT(write_out_of_bounds),
                                                       FAULT(use_after_release),
                                                       FAULT(uninitialised_read),
                                                       FAULT(misaligned_vector_load),
                                                       FAULT(race_between_blocks),
                                                       FAULT(read_of_another_blocks_result),
                                                       FAULT(overwritten_input_of_another_block),
                                                       FAULT(race_between_threads),
                                                       FAULT(shuffle_under_divergence),
                                                       FAULT(shuffle_from_a_lane_that_is_not_there),
                                                       FAULT(shuffle_of_other_masks),
                                                       FAULT(disagreement_about_arguments),
                                                       FAULT(fault_in_a_branch_for_the_device),
                                                       FAULT(more_threads_than_launch_bounds),
                                                       FAULT(division_by_zero)};

std::string run(const std::string& fault, bool planted) {
  Test test{planted};
  try {
    faults.at(fault)(test);
  } catch (const std::exception& error) {
    return error.what();
  }
  return test.holds() ? "nothing noticed" : "other results";
}

}  // namespace

#if defined(__CUDACC__)
extern "C" __attribute__((visibility("default"))) const char* planted_run(const char* fault, int planted) {
  static std::string answer;
  answer = run(fault, planted != 0);
  return answer.c_str();
}
extern "C" __attribute__((visibility("default"))) const char* planted_faults() {
  static std::string names;
  names.clear();
  for (const auto& [name, function] : faults) names += name + " ";
  return names.c_str();
}
#else
int main(int, char** argv) { std::printf("%s\n", run(argv[1], true).c_str()); }
#endif
