// Faults that the emulator must find, one per argument: `planted barrier|bounds|divergence|shared`. test_emulator.py
// runs them.

#include <cstdio>
#include <string>
#include <vector>

#include "cuda/start.cuh"

namespace {

constexpr int kThreads = 64;

__global__ void reverse(const float* in, float* out, bool with_barrier) {
  BCMF_SHARED(float, tile, kThreads);
  tile[threadIdx.x] = in[threadIdx.x];
  if (with_barrier) __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

__global__ void read_one_too_far(float* out) {
  BCMF_SHARED(float, tile, kThreads);
  tile[threadIdx.x] = 0;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x + 1];
}

__global__ void half_of_the_threads_wait() {
  if (threadIdx.x < kThreads / 2) __syncthreads();
}

__global__ void take_more_than_is_there() { bcmf::device::dynamic_shared<float>(0, kThreads); }

std::vector<float> run_reverse(emulator::Order order, bool with_barrier) {
  std::vector<float> in(kThreads), out(kThreads);
  for (int i = 0; i < kThreads; ++i) in[i] = static_cast<float>(i);
  emulator::order = order;
  bcmf::launch(reverse, 1, kThreads, 0, nullptr, in.data(), out.data(), with_barrier);
  return out;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

int main(int, char** argv) {
  const std::string fault = argv[1];
  if (fault == "barrier") {
    for (const bool with_barrier : {true, false}) {
      const auto forward = run_reverse(emulator::Order::forward, with_barrier);
      const bool same = same_bits(forward, run_reverse(emulator::Order::reversed, with_barrier)) &&
                        same_bits(forward, run_reverse(emulator::Order::shuffled, with_barrier));
      std::printf("%s barrier: %s\n", with_barrier ? "with" : "without", same ? "same bits" : "other bits");
    }
  } else if (fault == "bounds") {
    std::vector<float> out(kThreads);
    bcmf::launch(read_one_too_far, 1, kThreads, 0, nullptr, out.data());
  } else if (fault == "shared") {
    bcmf::launch(take_more_than_is_there, 1, 1, kThreads * sizeof(float) - 1, nullptr);
  } else if (fault == "divergence") {
    try {
      bcmf::launch(half_of_the_threads_wait, 1, kThreads, 0, nullptr);
    } catch (const std::exception& error) {
      std::printf("%s\n", error.what());
    }
  }
}
