// bcmf::pool_norm_relu and bcmf::add_norm_relu, each in one launch. A block has a few channels of a branch (with pools,
// of the map that is pooled) and all their pixels, so that it finds the statistics of a batch norm by itself. In eval
// mode, where there are none to find, several blocks share the pixels. Maps are small, so that what a block leaves in
// scratch memory for itself stays in the cache.
#pragma once

#include "common/geometry.h"
#include "common/lmfm.h"
#include "cuda/kernels/scalars.cuh"

namespace bcmf::device {

constexpr int kNormThreads = 512;

// A block has kSide channels, which are neighbours in memory in channels_last. A thread works on one of them, and
// shares its pixels with other threads: of `workers` threads this is number `worker`, which takes every workers-th
// pixel.
template <int kSide>
struct Lane {
  static constexpr int workers = kNormThreads / kSide;
  int channel, worker;
  bool exists;

  __device__ __forceinline__ Lane(int64_t group, int64_t C)
      : channel(static_cast<int>(group * kSide + threadIdx.x % kSide)),
        worker(static_cast<int>(threadIdx.x / kSide)),
        exists(channel < C) {}
};

// Gives every thread the sum over the threads of its channel, added up in a fixed order: first kFew threads add up the
// values of all, then each thread adds up what those have.
template <int kSide, typename Acc>
__device__ __forceinline__ Acc channel_sum(Acc value) {
  constexpr int kFew = 64;
  BCMF_SHARED(Acc, shared, kNormThreads);
  shared[threadIdx.x] = value;
  __syncthreads();
  if (threadIdx.x < kFew)
    for (int i = kFew; i < kNormThreads; i += kFew) shared[threadIdx.x] += shared[threadIdx.x + i];
  __syncthreads();
  Acc sum = 0;
#pragma unroll
  for (int i = 0; i < kFew; i += kSide) sum += shared[i + threadIdx.x % kSide];
  __syncthreads();  // `shared` may be written again
  return sum;
}

// One channel of a map, whose entries are read and written one by one.
template <typename Scalar>
struct Plane {
  using Acc = typename AccOf<Scalar>::type;
  Scalar* data;
  int64_t stride_n, stride_h, stride_w;

  __device__ __forceinline__ Plane(const MapView& view, int channel)
      : data(static_cast<Scalar*>(view.data) + channel * view.stride_c),
        stride_n(view.stride_n),
        stride_h(view.stride_h),
        stride_w(view.stride_w) {}
  __device__ __forceinline__ Scalar* at(int64_t n, int64_t y, int64_t x) const {
    return data + n * stride_n + y * stride_h + x * stride_w;
  }
  __device__ __forceinline__ Acc load(int64_t n, int y, int x) const { return widen(*at(n, y, x)); }
  __device__ __forceinline__ void store(Acc value, int64_t n, int y, int x) const { narrow(value, at(n, y, x)); }
};

// The place of pixel i, counted row by row from the image first_image on. (lmfm_tensors.h checks that all images
// together have less than 2^31 pixels.)
struct Pixel {
  int64_t n;
  int y, x;
  __device__ __forceinline__ Pixel(unsigned i, int64_t first_image, int64_t H, int64_t W) {
    const unsigned w = static_cast<unsigned>(W), h = static_cast<unsigned>(H), row = i / w;
    x = static_cast<int>(i % w), y = static_cast<int>(row % h), n = first_image + row / h;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Batch norm and ReLU

template <typename Acc>
struct Norm {
  Acc mean = 0, inverse_std = 0, scale = 0, bias = 0;

  __device__ __forceinline__ Norm(const Branch& branch, int channel, bool exists, Acc mean, Acc inverse_std)
      : mean(mean), inverse_std(inverse_std) {
    if (!exists) return;
    scale = inverse_std * static_cast<const Acc*>(branch.weight)[channel];
    bias = static_cast<const Acc*>(branch.bias)[channel];
  }
  __device__ __forceinline__ Acc centred(Acc z) const { return (z - mean) * inverse_std; }
  __device__ __forceinline__ Acc operator()(Acc z) const { return (z - mean) * scale + bias; }
  __device__ __forceinline__ Acc relu(Acc z) const {
    const Acc y = (*this)(z);
    return y < 0 ? Acc(0) : y;  // NaN stays NaN
  }
  // Returns the part of `grad`, the gradient of the ReLU's output, that passes the ReLU.
  __device__ __forceinline__ Acc passed(Acc z, Acc grad) const { return (*this)(z) <= 0 ? Acc(0) : grad; }
};

// Makes the norm of a batch, or of the running statistics in eval mode. z(i) is pixel i of `count`, of which the thread
// visits its own. `writes` is true for one of the blocks that share a channel: it writes stats.
template <int kSide, typename Acc, typename F>
__device__ __forceinline__ Norm<Acc> find_norm(const NormReluArgs& args, const Branch& branch, const Lane<kSide>& lane,
                                               unsigned count, bool writes, F z) {
  Acc mean = 0, variance = 0;
  if (args.training) {
    Acc sum = 0;
    for (unsigned i = lane.worker; i < count; i += lane.workers) sum += z(i);
    mean = channel_sum<kSide>(sum) / static_cast<Acc>(count);
    sum = 0;
    for (unsigned i = lane.worker; i < count; i += lane.workers) {
      const Acc difference = z(i) - mean;
      sum += difference * difference;
    }
    const Acc squares = channel_sum<kSide>(sum);
    variance = squares / static_cast<Acc>(count);
    if (lane.exists && lane.worker == 0) {
      const Acc momentum = static_cast<Acc>(args.momentum);
      Acc& running_mean = static_cast<Acc*>(branch.mean)[lane.channel];
      Acc& running_variance = static_cast<Acc*>(branch.variance)[lane.channel];
      running_mean += momentum * (mean - running_mean);
      running_variance += momentum * (squares / static_cast<Acc>(count - 1) - running_variance);
    }
  } else if (lane.exists) {
    mean = static_cast<const Acc*>(branch.mean)[lane.channel];
    variance = static_cast<const Acc*>(branch.variance)[lane.channel];
  }
  const Acc inverse_std = 1 / sqrt(variance + static_cast<Acc>(args.eps));
  if (writes && lane.exists && lane.worker == 0) {
    Acc* stats = static_cast<Acc*>(args.stats) + branch.first + lane.channel;
    stats[0] = mean;
    stats[args.channels] = inverse_std;
  }
  return {branch, lane.channel, lane.exists, mean, inverse_std};
}

// The norm that the forward has left in stats, with the gradients of its parameters, which the gradient of z needs.
template <int kSide, typename Acc>
struct NormGradient : Norm<Acc> {
  Acc weight, bias_sum;  // the gradients of weight and bias
  Acc inverse_count;     // 0 in eval mode, where the statistics do not depend on z

  // z(i) and grad(i) are pixel i of `count`, of which the thread visits its own.
  template <typename Z, typename G>
  __device__ __forceinline__ NormGradient(const NormReluArgs& args, const Branch& branch, const Lane<kSide>& lane,
                                          unsigned count, Z z, G grad)
      : Norm<Acc>(branch, lane.channel, lane.exists, read(args, branch, lane, 0), read(args, branch, lane, 1)) {
    Acc bias_part = 0, weight_part = 0;
    for (unsigned i = lane.worker; i < count; i += lane.workers) {
      const Acc value = z(i), passed = this->passed(value, grad(i));
      bias_part += passed;
      weight_part += passed * this->centred(value);
    }
    bias_sum = channel_sum<kSide>(bias_part);
    weight = channel_sum<kSide>(weight_part);
    inverse_count = args.training ? 1 / static_cast<Acc>(count) : Acc(0);
    if (lane.exists && lane.worker == 0) {
      Acc* grad_norms = static_cast<Acc*>(args.grad_norms) + branch.first + lane.channel;
      grad_norms[0] = weight;
      grad_norms[args.channels] = bias_sum;
    }
  }
  // Returns the gradient of z.
  __device__ __forceinline__ Acc at(Acc z, Acc grad) const {
    return this->scale * (this->passed(z, grad) - (bias_sum + this->centred(z) * weight) * inverse_count);
  }

 private:
  static __device__ __forceinline__ Acc read(const NormReluArgs& args, const Branch& branch, const Lane<kSide>& lane,
                                             int row) {
    const Acc* stats = static_cast<const Acc*>(args.stats) + row * args.channels + branch.first;
    return lane.exists ? stats[lane.channel] : Acc(0);
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Pools

// The bytes of a block's scratch memory: all pools, and their sums along y only.
template <typename Acc>
BCMF_HOST_DEVICE int64_t pool_block_bytes(const NormReluArgs& args, int side, int64_t parts) {
  int64_t values = 0;
  for (int p = 0; p < kPools; ++p) values += args.branch[p].H * (args.branch[p].W + args.branch[p].w);
  return args.N / parts * values * side * static_cast<int64_t>(sizeof(Acc));
}

// The pools of the block's channels, in some images. They lie in scratch memory, channels side by side.
template <typename Scalar, int kSide>
struct PoolBlock {
  using Acc = typename AccOf<Scalar>::type;
  const NormReluArgs& args;
  int64_t n, images;
  Lane<kSide> lane;
  Acc* scratch;  // of this thread's channel

  // This is one of `parts` blocks that share the images.
  __device__ __forceinline__ PoolBlock(const NormReluArgs& args, unsigned parts, char* memory)
      : args(args),
        n(blockIdx.x % parts * (args.N / parts)),
        images(args.N / parts),
        lane(blockIdx.x / parts, args.branch[0].C),
        scratch(reinterpret_cast<Acc*>(memory + blockIdx.x * pool_block_bytes<Acc>(args, kSide, parts)) +
                threadIdx.x % kSide) {}

  __device__ __forceinline__ unsigned pixels(int p) const {
    return static_cast<unsigned>(images * args.branch[p].H * args.branch[p].W);
  }
  __device__ __forceinline__ unsigned columns(int p) const {
    return static_cast<unsigned>(images * args.branch[p].H * args.branch[p].w);
  }
  __device__ __forceinline__ Acc* pooled(int p) const {
    int64_t before = 0;
    for (int q = 0; q < p; ++q) before += pixels(q) + columns(q);
    return scratch + before * kSide;
  }
  __device__ __forceinline__ Acc* pooled_down(int p) const { return pooled(p) + int64_t{pixels(p)} * kSide; }

  // Sums up column i (counted over all images) for all pools, reading each entry once. A window consists of two
  // stretches as long as its pool's stride, and the first entry of the next stretch.
  __device__ __forceinline__ void sum_down(unsigned i) const {
    const Branch& map = args.branch[0];
    const Plane<Scalar> plane(map.resampled, lane.exists ? lane.channel : 0);
    const unsigned w = static_cast<unsigned>(map.w), image = i / w, x = i % w;
    const int h = static_cast<int>(map.h);
    constexpr int kAtOnce = 8;  // entries that are read together: a multiple of all strides
    Acc before[kPools - 1] = {}, here[kPools - 1] = {}, total = 0;
    const auto store = [&](int p, int y, Acc sum) {
      pooled_down(p)[((image * args.branch[p].H + y) * w + x) * kSide] = sum;
    };
    for (int top = 0; top < h; top += kAtOnce) {
      Acc values[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k)
        values[k] = top + k < h ? plane.load(n + image, top + k, static_cast<int>(x)) : Acc(0);
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (top + k >= h) break;
        total += values[k];
#pragma unroll
        for (int p = 0; p < kPools - 1; ++p) {
          const int stride = 2 << p;
          if (k % stride == 0) {
            if (top + k > 0) store(p, (top + k) / stride - 1, before[p] + here[p] + values[k]);
            before[p] = here[p], here[p] = 0;
          }
          here[p] += values[k];
        }
      }
    }
#pragma unroll
    for (int p = 0; p < kPools - 1; ++p) store(p, (h - 1) / (2 << p), before[p] + here[p]);
    store(kPools - 1, 0, total);
  }

  // Fills pooled_down and pooled. After its barrier threads read what others have written; of `pooled` a thread later
  // reads only what it wrote itself.
  __device__ __forceinline__ void find() const {
    const Branch& map = args.branch[0];
    for (unsigned i = lane.worker; i < static_cast<unsigned>(images * map.w); i += lane.workers) sum_down(i);
    __syncthreads();
    for (int p = 0; p < kPools; ++p) {
      const Branch& branch = args.branch[p];
      const PoolAxis down = pool_axis(p, branch.h), across = pool_axis(p, branch.w);
      const Acc inverse_size = 1 / static_cast<Acc>(down.size * across.size);
      for (unsigned i = lane.worker; i < pixels(p); i += lane.workers) {
        const unsigned W = static_cast<unsigned>(branch.W);
        const int64_t x = i % W;
        const Acc* row = pooled_down(p) + i / W * branch.w * kSide;
        Acc sum = 0;
        for (int64_t k = across.first(x); k < across.end(x); ++k) sum += row[k * kSide];
        pooled(p)[int64_t{i} * kSide] = sum * inverse_size;
      }
    }
  }

  // Writes the gradient of the map. The gradients of the pools lie in the place of the pools.
  __device__ __forceinline__ void spread() const {
    __syncthreads();
    for (int p = 0; p < kPools; ++p) {
      const Branch& branch = args.branch[p];
      const PoolAxis down = pool_axis(p, branch.h), across = pool_axis(p, branch.w);
      const Acc inverse_size = 1 / static_cast<Acc>(down.size * across.size);
      for (unsigned i = lane.worker; i < columns(p); i += lane.workers) {
        const unsigned w = static_cast<unsigned>(branch.w);
        const int64_t x = i % w;
        const Acc* row = pooled(p) + i / w * branch.W * kSide;
        Acc sum = 0;
        for (int64_t k = across.first_with(x); k < across.end_with(x); ++k) sum += row[k * kSide];
        pooled_down(p)[int64_t{i} * kSide] = sum * inverse_size;
      }
    }
    __syncthreads();
    const Branch& map = args.branch[0];
    const Plane<Scalar> grad(map.grad_resampled, lane.exists ? lane.channel : 0);
    const unsigned count = static_cast<unsigned>(images * map.h * map.w);
    for (unsigned i = lane.worker; i < count; i += lane.workers) {
      const Pixel pixel(i, n, map.h, map.w);
      Acc sum = 0;
      for (int p = 0; p < kPools; ++p) {
        const PoolAxis down = pool_axis(p, map.h);
        const int64_t H = args.branch[p].H;
        const Acc* column = pooled_down(p) + ((pixel.n - n) * H * map.w + pixel.x) * kSide;
        for (int64_t k = down.first_with(pixel.y); k < down.end_with(pixel.y); ++k) sum += column[k * map.w * kSide];
      }
      if (lane.exists) grad.store(sum, pixel.n, pixel.y, pixel.x);
    }
  }
};

template <typename Scalar, int kSide>
__global__ void __launch_bounds__(kNormThreads)
    pool_forward(const __grid_constant__ NormReluArgs args, unsigned parts, char* scratch) {
  using Acc = typename AccOf<Scalar>::type;
  const PoolBlock<Scalar, kSide> block(args, parts, scratch);
  const Lane<kSide>& lane = block.lane;
  block.find();
  for (int p = 0; p < kPools; ++p) {
    const Branch& branch = args.branch[p];
    const Acc* pooled = block.pooled(p);
    const auto z = [&](unsigned i) { return pooled[int64_t{i} * kSide]; };
    const Norm<Acc> norm = find_norm<kSide, Acc>(args, branch, lane, block.pixels(p), block.n == 0, z);
    if (!lane.exists) continue;
    const Plane<Scalar> out(branch.out, lane.channel);
    for (unsigned i = lane.worker; i < block.pixels(p); i += lane.workers) {
      const Pixel pixel(i, block.n, branch.H, branch.W);
      out.store(norm.relu(z(i)), pixel.n, pixel.y, pixel.x);
    }
  }
}

template <typename Scalar, int kSide>
__global__ void __launch_bounds__(kNormThreads)
    pool_backward(const __grid_constant__ NormReluArgs args, char* scratch) {
  using Acc = typename AccOf<Scalar>::type;
  const PoolBlock<Scalar, kSide> block(args, 1, scratch);
  const Lane<kSide>& lane = block.lane;
  block.find();
  for (int p = 0; p < kPools; ++p) {
    const Branch& branch = args.branch[p];
    Acc* pooled = block.pooled(p);
    const Plane<Scalar> out(branch.out, lane.exists ? lane.channel : 0);
    const auto z = [&](unsigned i) { return pooled[int64_t{i} * kSide]; };
    const auto grad = [&](unsigned i) {
      const Pixel pixel(i, 0, branch.H, branch.W);
      return out.load(pixel.n, pixel.y, pixel.x);
    };
    const NormGradient<kSide, Acc> norm(args, branch, lane, block.pixels(p), z, grad);
    for (unsigned i = lane.worker; i < block.pixels(p); i += lane.workers)
      pooled[int64_t{i} * kSide] = norm.at(z(i), grad(i));
  }
  block.spread();
}

// ---------------------------------------------------------------------------------------------------------------------
// Sums of a resampled map and another one

// A table of bilinear resampling along an axis, of `in` cells to `out` pixels. Each block makes its own, because exact
// coordinates take 64-bit divisions.
template <typename Acc>
struct Taps {
  struct Tap {
    int first;
    Acc weight;  // of the cell after the first
  };
  int64_t in, out;
  Tap* table;

  __device__ __forceinline__ Taps(int64_t in, int64_t out, void* memory)
      : in(in), out(out), table(static_cast<Tap*>(memory)) {
    for (int64_t i = threadIdx.x; i < out; i += kNormThreads) {
      const AxisTap<Acc> tap = axis_tap<Acc>(i, in, out, false);
      table[i] = {static_cast<int>(tap.first), tap.weight};
    }
  }
  __device__ __forceinline__ Tap operator()(int64_t i) const { return table[i]; }
};

// Returns the gradient of a cell: the weighted sum of the gradients of the pixels between its neighbours, which are
// `stride` apart.
template <typename Acc>
__device__ __forceinline__ Acc gather(const Taps<Acc>& taps, int64_t cell, const Acc* grads, int64_t stride) {
  const int64_t begin = axis_start(cell - 1, taps.in, taps.out, false);
  const int64_t own = axis_start(cell, taps.in, taps.out, false);
  const int64_t end = axis_start(cell + 1, taps.in, taps.out, false);
  Acc sum = 0;
  for (int64_t i = begin; i < own; ++i) sum += taps(i).weight * grads[i * stride];
  for (int64_t i = own; i < end; ++i) sum += (1 - taps(i).weight) * grads[i * stride];
  return sum;
}

// The bytes of a block's scratch memory: tables, and in the backward after them the gradient of the sums (H, W), and
// the same gathered along y only (h, W).
template <typename Acc>
BCMF_HOST_DEVICE int64_t tables_bytes(const NormReluArgs& args) {
  const int64_t bytes = (args.branch[0].H + args.branch[0].W) * sizeof(typename Taps<Acc>::Tap);
  return (bytes + 15) / 16 * 16;
}
template <typename Acc>
BCMF_HOST_DEVICE int64_t add_block_bytes(const NormReluArgs& args, int side, bool backward) {
  int64_t most = 0;
  for (int b = 0; b < args.branches; ++b) {
    const Branch& branch = args.branch[b];
    const int64_t values = backward && branch.resampled.data ? args.N * (branch.H + branch.h) * branch.W : 0;
    most = values > most ? values : most;
  }
  const int64_t bytes = tables_bytes<Acc>(args) + most * side * static_cast<int64_t>(sizeof(Acc));
  return (bytes + 15) / 16 * 16;
}

BCMF_HOST_DEVICE int64_t groups_of(int64_t channels, int side) { return (channels + side - 1) / side; }

// The block's channels of a branch, and the sum of its maps.
template <typename Scalar, int kSide>
struct AddBlock {
  using Acc = typename AccOf<Scalar>::type;
  using Tap = typename Taps<Acc>::Tap;
  const Branch& branch;
  Lane<kSide> lane;
  Plane<Scalar> resampled, added, out;
  Taps<Acc> down, across;

  // `group` is the number of a group of kSide channels, counted over all branches.
  __device__ __forceinline__ AddBlock(const NormReluArgs& args, int64_t group, char* tables)
      : branch(branch_of(args, &group)),
        lane(group, branch.C),
        resampled(branch.resampled, channel()),
        added(branch.added, channel()),
        out(branch.out, channel()),
        down(branch.h, branch.H, tables),
        across(branch.w, branch.W, down.table + branch.H) {
    __syncthreads();
  }
  __device__ __forceinline__ int channel() const { return lane.exists ? lane.channel : 0; }

  // Returns the sum at a pixel.
  __device__ __forceinline__ Acc sum(const Pixel& pixel) const {
    Acc value = branch.added.data ? added.load(pixel.n, pixel.y, pixel.x) : Acc(0);
    if (!branch.resampled.data) return value;
    const Tap y = down(pixel.y), x = across(pixel.x);
    const int next_y = y.first + (y.weight != 0), next_x = x.first + (x.weight != 0);
    const Acc above =
        mix(resampled.load(pixel.n, y.first, x.first), resampled.load(pixel.n, y.first, next_x), x.weight);
    const Acc below = mix(resampled.load(pixel.n, next_y, x.first), resampled.load(pixel.n, next_y, next_x), x.weight);
    return value + mix(above, below, y.weight);
  }
  __device__ __forceinline__ Pixel pixel(unsigned i) const { return {i, 0, branch.H, branch.W}; }

 private:
  // Returns the branch of a group, and turns the group's number into one within the branch.
  static __device__ __forceinline__ const Branch& branch_of(const NormReluArgs& args, int64_t* group) {
    int b = 0;
    for (; *group >= groups_of(args.branch[b].C, kSide); ++b) *group -= groups_of(args.branch[b].C, kSide);
    return args.branch[b];
  }
};

template <typename Scalar, int kSide>
__global__ void __launch_bounds__(kNormThreads)
    add_forward(const __grid_constant__ NormReluArgs args, unsigned parts, unsigned pixels_of_a_part, char* scratch) {
  using Acc = typename AccOf<Scalar>::type;
  const AddBlock<Scalar, kSide> block(args, blockIdx.x / parts,
                                      scratch + blockIdx.x * add_block_bytes<Acc>(args, kSide, false));
  const Lane<kSide>& lane = block.lane;
  const unsigned begin = blockIdx.x % parts * pixels_of_a_part;
  const unsigned all = static_cast<unsigned>(args.N * block.branch.H * block.branch.W);
  const unsigned count = all - begin < pixels_of_a_part ? all - begin : pixels_of_a_part;
  const auto z = [&](unsigned i) { return block.sum(block.pixel(begin + i)); };
  const Norm<Acc> norm = find_norm<kSide, Acc>(args, block.branch, lane, count, begin == 0, z);
  if (!lane.exists) return;
  for (unsigned i = lane.worker; i < count; i += lane.workers) {
    const Pixel pixel = block.pixel(begin + i);
    block.out.store(norm.relu(block.sum(pixel)), pixel.n, pixel.y, pixel.x);
  }
}

template <typename Scalar, int kSide>
__global__ void __launch_bounds__(kNormThreads) add_backward(const __grid_constant__ NormReluArgs args, char* scratch) {
  using Acc = typename AccOf<Scalar>::type;
  char* memory = scratch + blockIdx.x * add_block_bytes<Acc>(args, kSide, true);
  const AddBlock<Scalar, kSide> block(args, blockIdx.x, memory);
  const Branch& branch = block.branch;
  const Lane<kSide>& lane = block.lane;
  const unsigned count = static_cast<unsigned>(args.N * branch.H * branch.W);
  Acc* grads = reinterpret_cast<Acc*>(memory + tables_bytes<Acc>(args)) + threadIdx.x % kSide;
  const auto z = [&](unsigned i) { return block.sum(block.pixel(i)); };
  const auto grad = [&](unsigned i) {
    const Pixel pixel = block.pixel(i);
    return block.out.load(pixel.n, pixel.y, pixel.x);
  };
  const NormGradient<kSide, Acc> norm(args, branch, lane, count, z, grad);
  const Plane<Scalar> grad_added(branch.grad_added, block.channel());
  for (unsigned i = lane.worker; i < count; i += lane.workers) {
    const Pixel pixel = block.pixel(i);
    const Acc value = norm.at(z(i), grad(i));
    if (branch.added.data && lane.exists) grad_added.store(value, pixel.n, pixel.y, pixel.x);
    if (branch.resampled.data) grads[int64_t{i} * kSide] = value;
  }
  if (!branch.resampled.data) return;
  __syncthreads();

  // The gradient of a cell is gathered along y first, then along x.
  Acc* rows = grads + int64_t{count} * kSide;
  const unsigned cells_down = static_cast<unsigned>(args.N * branch.h * branch.W);
  for (unsigned i = lane.worker; i < cells_down; i += lane.workers) {
    const Pixel cell(i, 0, branch.h, branch.W);
    const Acc* column = grads + (cell.n * branch.H * branch.W + cell.x) * kSide;
    rows[int64_t{i} * kSide] = gather(block.down, cell.y, column, branch.W * kSide);
  }
  __syncthreads();
  const Plane<Scalar> grad_resampled(branch.grad_resampled, block.channel());
  const unsigned cells = static_cast<unsigned>(args.N * branch.h * branch.w);
  for (unsigned i = lane.worker; i < cells; i += lane.workers) {
    const Pixel cell(i, 0, branch.h, branch.w);
    const Acc* row = rows + (cell.n * branch.h + cell.y) * branch.W * kSide;
    const Acc sum = gather(block.across, cell.x, row, kSide);
    if (lane.exists) grad_resampled.store(sum, cell.n, cell.y, cell.x);
  }
}

}  // namespace bcmf::device
