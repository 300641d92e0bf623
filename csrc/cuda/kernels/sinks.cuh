// Sinks write the gradients of label pixels to a tensor of the labels' size, in one of three layouts.
#pragma once

#include "cuda/kernels/logits.cuh"

namespace bcmf::device {

// Sinks take the gradients of stacks class by class, by `put` at the class's place, or of one pixel, by `put_one`.
// After the last one comes `finish`.

// The members that sinks into a tensor have in common: a place is how many entries a class begins behind the first.
struct Store {
  MapView view;

  __device__ __forceinline__ int64_t at(int c) const { return c * view.stride_c; }
  __device__ __forceinline__ int64_t next(int64_t place) const { return place + view.stride_c; }
  template <typename Source>
  __device__ __forceinline__ void finish(const Source&) const {}
};

// Stores to a tensor with any strides.
template <typename Scalar, typename Acc_>
struct StoreAny : Store {
  using Acc = Acc_;

  template <typename Source>
  __device__ __forceinline__ void put(const Source&, const typename Source::Tile& tile, int64_t place,
                                      const Acc (&value)[kStack]) const {
    tile.for_each([&](int k) { narrow(value[k], pixel(tile, k) + place); });
  }
  template <typename Source>
  __device__ __forceinline__ void put_one(const Source&, const typename Source::Tile& tile, int k, int c,
                                          Acc value) const {
    narrow(value, pixel(tile, k) + at(c));
  }
  template <typename Stack>
  __device__ __forceinline__ Scalar* pixel(const Stack& tile, int k) const {  // of the first class
    return static_cast<Scalar*>(view.data) + tile.n * view.stride_n + tile.y(k) * view.stride_h +
           tile.x(k) * view.stride_w;
  }
};

// Stores to a tensor with a layout that DirectRows could read.
template <typename Scalar>
struct StoreRows : StoreAny<Scalar, typename AccOf<Scalar>::type> {
  using Acc = typename AccOf<Scalar>::type;

  template <typename Source>
  __device__ __forceinline__ void put(const Source&, const typename Source::Tile& tile, int64_t place,
                                      const Acc (&value)[kStack]) const {
    if (tile.has(0)) store_narrowed(value, this->pixel(tile, 0) + place);
  }
};

// Stores to a tensor with a layout that DirectPixels could read. Gradients take the place of the staged logits, which
// are not needed any more, and are copied to memory from there.
template <typename Scalar>
struct StorePixels : Store {
  using Acc = typename AccOf<Scalar>::type;

  __device__ __forceinline__ int at(int c) const { return c; }
  __device__ __forceinline__ int next(int c) const { return c + 1; }
  __device__ __forceinline__ void put(const DirectPixels<Scalar>& source, const Stacks<false>& tile, int c,
                                      const Acc (&value)[kStack]) const {
    tile.for_each([&](int k) { narrow(value[k], source.staged_at(k, c)); });
  }
  __device__ __forceinline__ void put_one(const DirectPixels<Scalar>& source, const Stacks<false>&, int k, int c,
                                          Acc value) const {
    narrow(value, source.staged_at(k, c));
  }
  __device__ __forceinline__ void finish(const DirectPixels<Scalar>& source) const {
    __syncthreads();
    source.copy(view, [](const auto* shared, auto* memory) { *memory = *shared; });
  }
};

}  // namespace bcmf::device
