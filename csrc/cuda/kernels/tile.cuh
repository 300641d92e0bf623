// How the kernels of bcmf::loss divide the label pixels. A block has a tile of 64 x 16 of them, a warp a patch of 32 x
// 4 pixels of the tile, a thread a stack of 4 of the patch. These lie below each other, so that a warp reads 32
// neighbours of a row, or beside each other, so that a thread reads them at once. The threads of a block add up their
// numbers in a fixed order, and a later block adds up those of the tiles: sums have the same bits every time.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "common/terms.h"
#include "cuda/kernels/scalars.cuh"

namespace bcmf::device {

constexpr int kColumns = 64;
constexpr int kRows = 16;
constexpr int kStack = 4;
constexpr int kThreads = kColumns * kRows / kStack;
constexpr int kWarp = 32, kWarps = kThreads / kWarp;
constexpr int kPatchColumns = 32, kPatchRows = kStack;

// exp(x - y) for x <= y by the GPU's own power of two, which takes two instructions instead of eight; shift is
// exp_shift(y), and the difference takes none. The exponent is rounded when it is scaled, which adds an error of
// |x - y| exp(x - y) 2^-24 <= 2^-25, where the largest class has exp(0) = 1, to the instruction's own of 2^-22 of the
// result. Results below 2^-126 become 0.
#if defined(__CUDA_ARCH__)
__device__ __forceinline__ float exp_shift(float y) { return y * -1.4426950408889634f; }
__device__ __forceinline__ float exp_shifted(float x, float shift) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(fma(x, 1.4426950408889634f, shift)));
  return result;
}
#else
inline float exp_shift(float y) { return -y; }
inline float exp_shifted(float x, float shift) { return exp(x + shift); }
#endif
__device__ __forceinline__ double exp_shift(double y) { return -y; }
__device__ __forceinline__ double exp_shifted(double x, double shift) { return exp(x + shift); }
template <typename Acc>
__device__ __forceinline__ Acc exp_of(Acc x) {
  return exp_shifted(x, Acc(0));
}

// Lets a number be found here. The compiler would find it again in each iteration of a loop, to have more registers, or
// would not find it at all if nothing needs it.
__device__ __forceinline__ void keep([[maybe_unused]] float& x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+f"(x));
#endif
}
__device__ __forceinline__ void keep([[maybe_unused]] int& x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(x));
#endif
}
__device__ __forceinline__ void keep([[maybe_unused]] long long& x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(x));
#endif
}

template <typename Acc>
__device__ __forceinline__ constexpr Acc lowest() {
  return sizeof(Acc) == 8 ? static_cast<Acc>(-1.7976931348623157e308) : static_cast<Acc>(-3.402823466e38f);
}

BCMF_HOST_DEVICE unsigned tiles_down(const LossArgs& args) {
  return static_cast<unsigned>((args.H + kRows - 1) / kRows);
}
BCMF_HOST_DEVICE unsigned tiles_across(const LossArgs& args) {
  return static_cast<unsigned>((args.W + kColumns - 1) / kColumns);
}
BCMF_HOST_DEVICE int64_t tiles_of(const LossArgs& args) { return args.N * tiles_down(args) * tiles_across(args); }

// Calls f with `number`, which is one of 1..kMost, as a constant of its own type, so that loops are unrolled.
template <int kMost, typename F>
__device__ __forceinline__ void with_number(int number, F f) {
  if constexpr (kMost > 0) {
    if (number == kMost)
      f(std::integral_constant<int, kMost>());
    else
      with_number<kMost - 1>(number, f);
  }
}

// Packs of kCount entries are read and written at once, at addresses that are multiples of their size. They are copied
// as words, because the compiler would access 16-bit entries one by one.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Words {
  static_assert(kCount * sizeof(T) % 4 == 0);
  unsigned words[kCount * sizeof(T) / 4];
};
template <typename T, int kCount>
__device__ __forceinline__ void load_pack(const T* from, T (&to)[kCount]) {
  const Words<T, kCount> words = *reinterpret_cast<const Words<T, kCount>*>(from);
  memcpy(&to, &words, sizeof(words));
}
template <typename T, int kCount>
__device__ __forceinline__ void store_pack(const T (&from)[kCount], T* to) {
  Words<T, kCount> words;
  memcpy(&words, &from, sizeof(words));
  *reinterpret_cast<Words<T, kCount>*>(to) = words;
}

// Reads a struct of words at once.
template <typename T>
__device__ __forceinline__ void load_whole(const T* from, T& to) {
  const Words<T, 1> words = *reinterpret_cast<const Words<T, 1>*>(from);
  memcpy(&to, &words, sizeof(words));
}

// The same of logits and gradients that are computed in fp32.
template <typename Scalar, int kCount>
__device__ __forceinline__ void load_widened(const Scalar* from, float (&to)[kCount]) {
  constexpr int kEntries = WordOf<Scalar>::kEntries;
  const Words<Scalar, kCount> words = *reinterpret_cast<const Words<Scalar, kCount>*>(from);
#pragma unroll
  for (int i = 0; i < kCount / kEntries; ++i) WordOf<Scalar>::widen(words.words[i], to + i * kEntries);
}
template <typename Scalar, int kCount>
__device__ __forceinline__ void store_narrowed(const float (&from)[kCount], Scalar* to) {
  constexpr int kEntries = WordOf<Scalar>::kEntries;
  Words<Scalar, kCount> words;
#pragma unroll
  for (int i = 0; i < kCount / kEntries; ++i) {
    const auto entries = WordOf<Scalar>::narrow(from + i * kEntries);
    memcpy(&words.words[i], &entries, sizeof(entries));
  }
  *reinterpret_cast<Words<Scalar, kCount>*>(to) = words;
}

// Tells whether all rows of the images, and of the classes that are stride_c apart (0: of one class), begin at
// addresses that are multiples of `entries` entries.
template <typename Scalar>
bool begins_at(const MapView& view, const LossArgs& args, int64_t stride_c, int entries) {
  const auto divides = [=](int64_t size, int64_t stride) { return size <= 1 || stride % entries == 0; };
  return reinterpret_cast<uintptr_t>(view.data) % (entries * sizeof(Scalar)) == 0 && divides(args.N, view.stride_n) &&
         divides(args.C, stride_c) && divides(args.H, view.stride_h);
}

// A tile, usually of this block. loss_tensors.cpp checks that sides are below 2^30.
struct Tile {
  int64_t n;
  int H, W, top, left;
  int rows, columns;  // within the image

  __device__ __forceinline__ explicit Tile(const LossArgs& args, unsigned index = blockIdx.x)
      : H(static_cast<int>(args.H)), W(static_cast<int>(args.W)) {
    const unsigned across = tiles_across(args), down = tiles_down(args);
    n = index / across / down;
    top = static_cast<int>(index / across % down) * kRows;
    left = static_cast<int>(index % across) * kColumns;
    rows = H - top < kRows ? H - top : kRows;
    columns = W - left < kColumns ? W - left : kColumns;
  }
  __device__ __forceinline__ int64_t pixel_at(int row, int column) const {
    return (n * H + top + row) * W + left + column;
  }
};

// The tile, with the stack of this thread. kAcross: the stack's pixels lie beside each other, and either all or none of
// them lie within the image; otherwise they lie below each other.
template <bool kAcross_>
struct Stacks : Tile {
  static constexpr bool kAcross = kAcross_;
  int first_row, first_column;  // of the thread's stack, in the tile
  int64_t first_pixel;          // of the batch

  __device__ __forceinline__ explicit Stacks(const LossArgs& args) : Stacks(Tile(args)) {}
  __device__ __forceinline__ explicit Stacks(const Tile& tile) : Tile(tile) {
    constexpr int kPerRow = kAcross ? kPatchColumns / kStack : kPatchColumns;  // stacks
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    first_row = patch_row() + lane / kPerRow;
    first_column = patch_column() + lane % kPerRow * (kAcross ? kStack : 1);
    first_pixel = this->pixel_at(first_row, first_column);
  }
  // The warp's patch, in the tile; and whether any of it lies within the image.
  __device__ __forceinline__ int patch_row() const {
    return static_cast<int>(threadIdx.x) / kWarp / (kColumns / kPatchColumns) * kPatchRows;
  }
  __device__ __forceinline__ int patch_column() const {
    return static_cast<int>(threadIdx.x) / kWarp % (kColumns / kPatchColumns) * kPatchColumns;
  }
  __device__ __forceinline__ bool has_patch() const { return patch_row() < rows && patch_column() < columns; }
  __device__ __forceinline__ int row(int k) const { return kAcross ? first_row : first_row + k; }
  __device__ __forceinline__ int column(int k) const { return kAcross ? first_column + k : first_column; }
  __device__ __forceinline__ int y(int k) const { return top + row(k); }
  __device__ __forceinline__ int x(int k) const { return left + column(k); }
  __device__ __forceinline__ bool has(int k) const {
    return kAcross ? first_column < columns && first_row < rows : first_column < columns && row(k) < rows;
  }
  __device__ __forceinline__ int64_t pixel(int k) const { return first_pixel + (kAcross ? k : int64_t{k} * W); }

  // Read and write the stack's entries of a map (N, H, W).
  template <typename T>
  __device__ __forceinline__ void load(const T* map, T (&values)[kStack]) const {
    if constexpr (kAcross) {
      if (!has(0)) return;
      load_pack(map + pixel(0), values);
    } else {
      for_each([&](int k) { values[k] = map[pixel(k)]; });
    }
  }
  template <typename T>
  __device__ __forceinline__ void store(const T (&values)[kStack], T* map) const {
    if constexpr (kAcross) {
      if (!has(0)) return;
      store_pack(values, map + pixel(0));
    } else {
      for_each([&](int k) { map[pixel(k)] = values[k]; });
    }
  }
  // Calls f(k) for the pixels of the stack that lie in the image.
  template <typename F>
  __device__ __forceinline__ void for_each(F f) const {
    if (!has(0)) return;
#pragma unroll
    for (int k = 0; k < kStack; ++k)
      if (kAcross || k == 0 || row(k) < rows) f(k);
  }
};

// Gives every thread the sum over the block, added up in a fixed order. `shared` holds kThreads entries.
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

// Tells every thread of the block whether any of them has a true value.
__device__ __forceinline__ bool any_of_block(bool value) {
  BCMF_SHARED(unsigned, any, 1);
  if (threadIdx.x == 0) any[0] = 0;
  __syncthreads();  // bits are added to the 0, if any value is true
  if (value) atomicOr(any, 1u);
  __syncthreads();  // all bits are there
  const bool found = any[0] != 0;
  __syncthreads();  // `any` may be written again
  return found;
}

// Returns the sum of `value` over the threads before this one, and in `total` the sum over all of the block.
__device__ __forceinline__ int scan_block(int value, int* total) {
  BCMF_SHARED(int, shared, kWarps);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  int sum = value;
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, sum, lanes);
    sum += lane >= lanes ? other : 0;
  }
  if (lane == kWarp - 1) shared[warp] = sum;
  __syncthreads();
  int before = sum - value;
  *total = 0;
  for (int i = 0; i < kWarps; ++i) {
    before += i < warp ? shared[i] : 0;
    *total += shared[i];
  }
  __syncthreads();  // `shared` may be written again
  return before;
}

// Gives every thread of the warp the sum of `value` over all of them.
template <typename T>
__device__ __forceinline__ T sum_of_warp(T value) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  return value;
}

// Gives the first thread the sum of `value` over the block, added up in a fixed order.
template <typename T>
__device__ __forceinline__ T sum_of_block(T value) {
  BCMF_SHARED(T, shared, kWarps);
  value = sum_of_warp(value);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();  // the sums of all warps are there
  T sum = 0;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < kWarps; ++warp) sum += shared[warp];
  return sum;
}

// Adds up two values of all threads of the block, and stores the sums as the tile's column of partials (2, tiles). A
// warp adds up in the type of the values, in a fixed order: first each half of it one of the two, of both halves.
template <typename T>
__device__ __forceinline__ void store_partials(const T (&values)[2], double* partials) {
  BCMF_SHARED(T, shared, 2 * kWarps);
  constexpr int kHalf = kWarp / 2;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, half = static_cast<int>(threadIdx.x) / kHalf % 2;
  T sum = half == 0 ? values[0] : values[1];
  sum += __shfl_xor_sync(0xffffffffu, half == 0 ? values[1] : values[0], kHalf);
  for (int lanes = kHalf / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  if (threadIdx.x % kHalf == 0) shared[half * kWarps + warp] = sum;
  __syncthreads();  // the sums of all warps are there
  if (threadIdx.x < 2) {
    double of_tile = 0;
    for (int i = 0; i < kWarps; ++i) of_tile += shared[threadIdx.x * kWarps + i];
    partials[threadIdx.x * static_cast<int64_t>(gridDim.x) + blockIdx.x] = of_tile;
  }
  __syncthreads();  // `shared` may be written again
}

// Returns the sum of the partial sums of all tiles. Each thread adds up a fixed subset of them in the order of tiles.
__device__ __forceinline__ double load_partials(const double* partials, int64_t tiles) {
  BCMF_SHARED(double, shared, kThreads);
  double sum = 0;
#pragma unroll 8
  for (int64_t tile = threadIdx.x; tile < tiles; tile += kThreads) sum += partials[tile];
  return block_sum(sum, shared);
}

template <typename Acc>
__device__ __forceinline__ Acc weight_of(const LossArgs& args, int label) {
  return args.weight ? static_cast<const Acc*>(args.weight)[label] : Acc(1);
}

}  // namespace bcmf::device
