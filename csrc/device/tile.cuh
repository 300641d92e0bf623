// How the kernels of bcmf::loss divide the label pixels: a block has a tile of 64 x 16 of them, a thread a stack of 4
// that lie below each other, so that a warp reads 32 neighbours of a row. Sums go over the block in a fixed order, and
// over the tiles by one block later: the same bits every time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "common.cuh"
#include "launch.cuh"

namespace bcmf::device {

constexpr int kColumns = 64;
constexpr int kRows = 16;
constexpr int kStack = 4;
constexpr int kThreads = kColumns * kRows / kStack;

template <typename Scalar>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};

// Explicit conversions: torch's build switches the implicit ones off.
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ void narrow(float x, __half* to) { *to = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, float* to) { *to = x; }
__device__ __forceinline__ void narrow(double x, double* to) { *to = x; }

BCMF_HOST_DEVICE int64_t tiles_down(const LossArgs& args) { return (args.H + kRows - 1) / kRows; }
BCMF_HOST_DEVICE int64_t tiles_across(const LossArgs& args) { return (args.W + kColumns - 1) / kColumns; }
BCMF_HOST_DEVICE int64_t tiles_of(const LossArgs& args) { return args.N * tiles_down(args) * tiles_across(args); }

// The tile of this block, and where the thread's stack begins.
struct Tile {
  int64_t n, top, left;
  int rows, columns;  // fewer at the border
  int row, column;    // of the stack, in the tile

  __device__ __forceinline__ explicit Tile(const LossArgs& args) {
    const int64_t across = tiles_across(args), down = tiles_down(args), index = blockIdx.x;
    n = index / (across * down);
    top = index / across % down * kRows;
    left = index % across * kColumns;
    rows = static_cast<int>(args.H - top < kRows ? args.H - top : kRows);
    columns = static_cast<int>(args.W - left < kColumns ? args.W - left : kColumns);
    row = static_cast<int>(threadIdx.x) / kColumns * kStack;
    column = static_cast<int>(threadIdx.x) % kColumns;
  }
  __device__ __forceinline__ bool has(int k) const { return column < columns && row + k < rows; }
  __device__ __forceinline__ int64_t x() const { return left + column; }
  __device__ __forceinline__ int64_t y(int k) const { return top + row + k; }
  __device__ __forceinline__ int64_t pixel(const LossArgs& args, int k) const {
    return (n * args.H + y(k)) * args.W + x();
  }
};

// f(k) for the pixels of the thread's stack.
template <typename F>
__device__ __forceinline__ void for_stack(const Tile& tile, F f) {
#pragma unroll
  for (int k = 0; k < kStack; ++k)
    if (tile.has(k)) f(k);
}

// Sum over the block in a fixed order, for every thread. `shared` holds kThreads entries.
template <typename T>
__device__ __forceinline__ T block_sum(T value, T* shared) {
  shared[threadIdx.x] = value;
  __syncthreads();
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  const T sum = shared[0];
  __syncthreads();  // `shared` may be written again
  return sum;
}

// Adds K values of all threads of the block up and stores the sums: partials (K, tiles).
template <int K>
__device__ __forceinline__ void store_partials(const double (&values)[K], double* partials) {
  constexpr int kWarp = 32, kWarps = kThreads / kWarp;
  BCMF_SHARED(double, shared, K* kWarps);
#pragma unroll
  for (int entry = 0; entry < K; ++entry) {
    double sum = values[entry];
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    if (threadIdx.x % kWarp == 0) shared[entry * kWarps + threadIdx.x / kWarp] = sum;
  }
  __syncthreads();
  if (threadIdx.x < K) {
    double sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += shared[threadIdx.x * kWarps + warp];
    partials[threadIdx.x * static_cast<int64_t>(gridDim.x) + blockIdx.x] = sum;
  }
  __syncthreads();  // `shared` may be written again
}

// Adds the partial sums of all tiles up, each thread a fixed subset in index order.
__device__ __forceinline__ double load_partials(const double* partials, int64_t tiles) {
  BCMF_SHARED(double, shared, kThreads);
  double sum = 0;
  for (int64_t tile = threadIdx.x; tile < tiles; tile += kThreads) sum += partials[tile];
  return block_sum(sum, shared);
}

// totals (K,) of partials (K, tiles), a block each.
static __global__ void __launch_bounds__(kThreads) add_tiles(const double* partials, int64_t tiles, double* totals) {
  const double sum = load_partials(partials + blockIdx.x * tiles, tiles);
  if (threadIdx.x == 0) totals[blockIdx.x] = sum;
}

template <typename Acc>
__device__ __forceinline__ Acc weight_of(const LossArgs& args, int label) {
  return args.weight ? static_cast<const Acc*>(args.weight)[label] : Acc(1);
}

// A class, or kIgnored (of bad labels, too): what BCL and CPG see.
__device__ __forceinline__ int class_at(const LossArgs& args, int64_t n, int64_t y, int64_t x) {
  const int label = read_label(args, n, y, x);
  return label < 0 ? kIgnored : label;
}

__device__ __forceinline__ int64_t clamp(int64_t i, int64_t length) { return i < 0 ? 0 : i < length ? i : length - 1; }

}  // namespace bcmf::device
