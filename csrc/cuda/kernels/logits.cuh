// Sources read the logits of label pixels: from a tensor of the labels' size, in one of three layouts, or from one of
// another size, which is resampled bilinearly pixel by pixel (upsampled.cuh has another source for those).
#pragma once

#include "common/geometry.h"
#include "cuda/kernels/tile.cuh"

namespace bcmf::device {

// Sources read class by class: the thread's stack of class c is at a place that `at` gives for c, and `next` for the
// class behind another one. `take` takes their shared memory on the host. A class can be read if `is_ready`; `stage`
// makes classes from `begin` on ready, and returns the first one that is not. What is read beyond the border of the
// image may be anything. read<true> may be used only if is_plain(). kBlocks: how many blocks of a kernel of the
// backward a multiprocessor has to have room for (__launch_bounds__); with more of them, more reads are under way, and
// a thread has fewer registers. kForwardBlocks: of dense_forward, which needs fewer registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kMoreBlocks = 2;  // it would spill
#else
constexpr int kMoreBlocks = 3;
#endif

// Reads single logits of the labels' size.
template <typename Scalar_>
struct DirectEntries {
  using Scalar = Scalar_;
  using Acc = typename AccOf<Scalar>::type;
  static constexpr int kAtOnce = sizeof(Acc) == 8 ? 1 : 4;  // classes that are read together
  static constexpr bool kPacksStats = true;                 // see stats.cuh
  const MapView& view;

  using Staged = SharedArray<Scalar>;
  static Staged take(const LossArgs&, SharedCutter&) { return {}; }
  __device__ __forceinline__ explicit DirectEntries(const LossArgs& args) : view(args.logits) {}
  __device__ __forceinline__ int stage(int, int end) const { return end; }
  __device__ __forceinline__ bool is_ready(int) const { return true; }
  __device__ __forceinline__ bool is_plain() const { return true; }
  __device__ __forceinline__ Acc at(int64_t n, int y, int x, int c) const {
    return widen(data()[n * view.stride_n + c * view.stride_c + y * view.stride_h + x * view.stride_w]);
  }
  __device__ __forceinline__ const Scalar* data() const { return static_cast<const Scalar*>(view.data); }
};

// Reads stacks of logits with any strides. It is fast where neighbours along x are neighbours in memory.
template <typename Scalar>
struct DirectAny : DirectEntries<Scalar> {
  using Entries = DirectEntries<Scalar>;
  using typename Entries::Acc;
  using Tile = Stacks<false>;
  static constexpr int kBlocks = 1, kForwardBlocks = 1;
  const Scalar* stack_[kStack];

  __device__ __forceinline__ DirectAny(const LossArgs& args, const Tile& tile, const SharedArray<Scalar>&)
      : Entries(args) {
    const Scalar* column = this->data() + tile.n * this->view.stride_n + clamp(tile.x(0), tile.W) * this->view.stride_w;
#pragma unroll
    for (int k = 0; k < kStack; ++k) stack_[k] = column + clamp(tile.y(k), tile.H) * this->view.stride_h;
  }
  __device__ __forceinline__ int64_t at(int c) const { return c * this->view.stride_c; }
  __device__ __forceinline__ int64_t next(int64_t place) const { return place + this->view.stride_c; }
  template <bool = false>
  __device__ __forceinline__ void read(int64_t place, Acc (&z)[kStack]) const {
#pragma unroll
    for (int k = 0; k < kStack; ++k) z[k] = widen(stack_[k][place]);
  }
  // Reads class c of one pixel of the stack.
  __device__ __forceinline__ Acc own(int k, int c) const { return widen(stack_[k][c * this->view.stride_c]); }
};

// Reads a stack at once, from logits that are contiguous along x and whose rows begin at multiples of a stack.
template <typename Scalar>
struct DirectRows : DirectEntries<Scalar> {
  using Entries = DirectEntries<Scalar>;
  using typename Entries::Acc;
  using Tile = Stacks<true>;
  static constexpr int kBlocks = 2, kForwardBlocks = kMoreBlocks;
  const Scalar* first_;

  static bool can_read(const MapView& view, const LossArgs& args) {
    return view.stride_w == 1 && args.W % kStack == 0 && begins_at<Scalar>(view, args, view.stride_c, kStack);
  }
  __device__ __forceinline__ DirectRows(const LossArgs& args, const Tile& tile, const SharedArray<Scalar>&)
      : Entries(args) {
    const int y = tile.has(0) ? tile.y(0) : tile.top, x = tile.has(0) ? tile.x(0) : tile.left;
    first_ = this->data() + tile.n * this->view.stride_n + y * this->view.stride_h + x;
  }
  __device__ __forceinline__ const Scalar* at(int c) const { return first_ + c * this->view.stride_c; }
  __device__ __forceinline__ const Scalar* next(const Scalar* place) const { return place + this->view.stride_c; }
  template <bool = false>
  __device__ __forceinline__ void read(const Scalar* place, Acc (&z)[kStack]) const {
    load_widened(place, z);
  }
  __device__ __forceinline__ Acc own(int k, int c) const { return widen(first_[c * this->view.stride_c + k]); }
};

// Reads logits that are contiguous along classes, then along x (channels_last). The block first copies its tile to
// shared memory, whole rows at a time. Where whole units of 8 bytes are a pixel's classes, an odd number of units lies
// between neighbouring pixels there: threads would all read from a few banks otherwise.
template <typename Scalar>
struct DirectPixels : DirectEntries<Scalar> {
  using Entries = DirectEntries<Scalar>;
  using typename Entries::Acc;
  using Tile = Stacks<false>;
  static constexpr int kBlocks = 2, kForwardBlocks = kMoreBlocks;
  static constexpr int kVector = 16 / sizeof(Scalar), kUnit = 8 / sizeof(Scalar);
  struct Staged {
    SharedArray<Scalar> pixels;
    int pitch;  // from a pixel to the next
  };
  const Tile& tile;
  Scalar* staged;  // (kRows, kColumns, pitch)
  int C, pitch;

  static bool can_read(const MapView& view, const LossArgs& args) {
    return view.stride_c == 1 && view.stride_w == args.C && args.W * args.C % kVector == 0 &&
           begins_at<Scalar>(view, args, 0, kVector);
  }
  static Staged take(const LossArgs& args, SharedCutter& shared) {
    const int64_t pitch = args.C % kUnit == 0 ? (args.C / kUnit | 1) * kUnit : args.C;
    return {shared.take<Scalar>(kRows * kColumns * pitch), static_cast<int>(pitch)};
  }
  __device__ __forceinline__ DirectPixels(const LossArgs& args, const Tile& tile, const Staged& memory)
      : Entries(args), tile(tile), staged(memory.pixels.data()), C(static_cast<int>(args.C)), pitch(memory.pitch) {
    copy(this->view, [](auto* shared, const auto* memory) { *shared = *memory; });
    __syncthreads();
  }
  __device__ __forceinline__ int at(int c) const { return c; }
  __device__ __forceinline__ int next(int c) const { return c + 1; }
  template <bool = false>
  __device__ __forceinline__ void read(int c, Acc (&z)[kStack]) const {
#pragma unroll
    for (int k = 0; k < kStack; ++k) z[k] = widen(*staged_at(k, c));
  }
  __device__ __forceinline__ Acc own(int k, int c) const { return Entries::at(tile.n, tile.y(k), tile.x(k), c); }
  __device__ __forceinline__ Scalar* staged_at(int k, int c) const {
    return staged + (tile.row(k) * kColumns + tile.column(k)) * pitch + c;
  }
  // Calls f(shared, memory) for all of the tile, 16 bytes at a time, or a unit. A row of the tile is a multiple of 16
  // bytes long, as can_read has found a row of the image to be.
  template <typename F>
  __device__ __forceinline__ void copy(const MapView& to, F f) const {
    Scalar* corner =
        static_cast<Scalar*>(to.data) + tile.n * to.stride_n + tile.top * to.stride_h + tile.left * to.stride_w;
    constexpr int kPerRow = kThreads / kRows;  // threads to a row: no division by its length
    const int row = static_cast<int>(threadIdx.x) / kPerRow, lane = static_cast<int>(threadIdx.x) % kPerRow;
    if (row >= tile.rows) return;
    Scalar *shared = staged + row * kColumns * pitch, *memory = corner + row * to.stride_h;
    if (C % kUnit != 0) {
#pragma unroll 4
      for (int entry = lane * kVector; entry < tile.columns * C; entry += kPerRow * kVector)
        f(reinterpret_cast<Words<Scalar, kVector>*>(shared + entry),
          reinterpret_cast<Words<Scalar, kVector>*>(memory + entry));
      return;
    }
    const int of_pixel = C / kUnit, columns = kPerRow / of_pixel, rest = kPerRow % of_pixel;
    int column = lane / of_pixel, unit = lane % of_pixel;
#pragma unroll 4
    for (int i = lane; i < tile.columns * of_pixel; i += kPerRow) {
      f(reinterpret_cast<Words<Scalar, kUnit>*>(shared + column * pitch + unit * kUnit),
        reinterpret_cast<Words<Scalar, kUnit>*>(memory + i * kUnit));
      column += columns, unit += rest;
      if (unit >= of_pixel) ++column, unit -= of_pixel;
    }
  }
};

// An AxisTap that takes few registers: its second index is the neighbour of the first, if there is one.
template <typename Acc>
struct Tap {
  int first;
  Acc weight;
  __device__ __forceinline__ Tap() {}
  __device__ __forceinline__ Tap(int64_t i, int64_t in, int64_t out, bool align_corners) {
    const AxisTap<Acc> tap = axis_tap<Acc>(i, in, out, align_corners);
    first = static_cast<int>(tap.first), weight = tap.weight;
  }
};

// Reads single logits of another size.
template <typename Scalar_>
struct ResampledEntries {
  using Scalar = Scalar_;
  using Acc = typename AccOf<Scalar>::type;
  static constexpr bool kPacksStats = false;
  const LossArgs& args;

  __device__ __forceinline__ explicit ResampledEntries(const LossArgs& args) : args(args) {}
  __device__ __forceinline__ Acc at(int64_t n, int y, int x, int c) const {
    return between(image(n) + c * args.logits.stride_c, tap_x(x), tap_y(y));
  }
  __device__ __forceinline__ const Scalar* image(int64_t n) const {
    return static_cast<const Scalar*>(args.logits.data) + n * args.logits.stride_n;
  }
  __device__ __forceinline__ Tap<Acc> tap_x(int x) const { return {x, args.w, args.W, args.align_corners}; }
  __device__ __forceinline__ Tap<Acc> tap_y(int y) const { return {y, args.h, args.H, args.align_corners}; }
  __device__ __forceinline__ int after(const Tap<Acc>& across) const {
    return across.first + 1 < args.w ? across.first + 1 : across.first;
  }
  __device__ __forceinline__ int below(const Tap<Acc>& down) const {
    return down.first + 1 < args.h ? down.first + 1 : down.first;
  }
  __device__ __forceinline__ Acc between(const Scalar* map, const Tap<Acc>& across, const Tap<Acc>& down) const {
    const Scalar *upper = map + down.first * args.logits.stride_h, *lower = map + below(down) * args.logits.stride_h;
    const int64_t left = across.first * args.logits.stride_w, right = after(across) * args.logits.stride_w;
    return mix(mix(widen(upper[left]), widen(upper[right]), across.weight),
               mix(widen(lower[left]), widen(lower[right]), across.weight), down.weight);
  }
};

// Reads stacks of logits of another size, each pixel by itself.
template <typename Scalar>
struct Resampled : ResampledEntries<Scalar> {
  using Entries = ResampledEntries<Scalar>;
  using typename Entries::Acc;
  using Tile = Stacks<false>;
  static constexpr int kAtOnce = 1, kBlocks = 1, kForwardBlocks = 1;
  const Scalar* first_;
  Tap<Acc> across, down[kStack];

  using Staged = SharedArray<Scalar>;
  static Staged take(const LossArgs&, SharedCutter&) { return {}; }
  __device__ __forceinline__ Resampled(const LossArgs& args, const Tile& tile, const SharedArray<Scalar>&)
      : Entries(args), first_(this->image(tile.n)), across(this->tap_x(clamp(tile.x(0), tile.W))) {
#pragma unroll
    for (int k = 0; k < kStack; ++k) down[k] = this->tap_y(clamp(tile.y(k), tile.H));
  }
  __device__ __forceinline__ int stage(int, int end) const { return end; }
  __device__ __forceinline__ bool is_ready(int) const { return true; }
  __device__ __forceinline__ bool is_plain() const { return true; }
  __device__ __forceinline__ int at(int c) const { return c; }
  __device__ __forceinline__ int next(int c) const { return c + 1; }
  template <bool = false>
  __device__ __forceinline__ void read(int c, Acc (&z)[kStack]) const {
#pragma unroll
    for (int k = 0; k < kStack; ++k) z[k] = own(k, c);
  }
  __device__ __forceinline__ Acc own(int k, int c) const {
    return this->between(first_ + c * this->args.logits.stride_c, across, down[k]);
  }
};

// Reads kCount classes of a stack from `place` on, which goes behind them. All reads are under way at the same time.
template <bool kPlain, typename Source, typename Place, typename Acc, int kCount>
__device__ __forceinline__ void read_classes(const Source& source, Place& place, Acc (&z)[kCount][kStack]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j, place = source.next(place)) source.template read<kPlain>(place, z[j]);
}

// Calls f(first, z) for groups of all classes of a stack, z[j] being class first + j. Groups may have different
// lengths, but those of all stacks are the same: equal logits give equal bits, whatever order f adds them up in.
template <typename Source, typename F>
__device__ __forceinline__ void for_classes(const Source& source, int C, F f) {
  constexpr int kAtOnce = Source::kAtOnce;
  using Acc = typename Source::Acc;
  for (int first = 0; first < C;) {
    const int end = source.stage(first, C);
    auto place = source.at(first);
    const auto for_groups = [&](auto plain) {
#pragma unroll 1
      for (; first + kAtOnce <= end; first += kAtOnce) {
        Acc z[kAtOnce][kStack];
        read_classes<decltype(plain)::value>(source, place, z);
        f(first, z);
      }
      with_number<kAtOnce - 1>(end - first, [&](auto count) {
        Acc z[decltype(count)::value][kStack];
        read_classes<decltype(plain)::value>(source, place, z);
        f(first, z);
      });
    };
    if (source.is_plain())
      for_groups(std::true_type());
    else
      for_groups(std::false_type());
    first = end;
  }
}

}  // namespace bcmf::device
