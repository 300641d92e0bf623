// The CUDA kernels of bcmf::loss. A tile is kTilePixels consecutive pixels of the batch, one block each; a thread owns
// a pixel at a time and walks its classes, so that a warp reads 32 neighbouring pixels of one class plane.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "common.cuh"

namespace bcmf::device {

constexpr int kThreads = 256;
constexpr int kTilePixels = 1024;

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

struct Pixel {
  int64_t n, y, x;
};
__device__ __forceinline__ Pixel pixel_at(const LossArgs& args, int64_t index) {
  const int64_t row = index / args.W;
  return {row / args.H, row % args.H, index % args.W};
}
__device__ __forceinline__ int64_t offset_of(const LogitView& v, const Pixel& at) {
  return at.n * v.stride_n + at.y * v.stride_h + at.x * v.stride_w;
}

// Sum over the block in a fixed order; the result is valid in thread 0. `shared` holds kThreads doubles.
__device__ __forceinline__ double block_sum(double value, double* shared) {
  shared[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  const double sum = shared[0];
  __syncthreads();  // `shared` may be written again
  return sum;
}

// Writes stats, and per tile the sums of w * nll and of w: partials[tile], partials[tiles + tile].
template <typename Scalar>
__global__ void __launch_bounds__(kThreads) loss_forward_tiles(LossArgs args, double* partials) {
  using Acc = typename AccOf<Scalar>::type;
  __shared__ double shared[kThreads];
  const int64_t pixels = args.N * args.H * args.W;
  const Acc* weight = static_cast<const Acc*>(args.weight);
  Acc* max_logit = static_cast<Acc*>(args.stats);
  Acc* log_sum = max_logit + pixels;

  double weighted_nll = 0, weight_sum = 0;
  for (int k = threadIdx.x; k < kTilePixels; k += kThreads) {
    const int64_t index = blockIdx.x * static_cast<int64_t>(kTilePixels) + k;
    if (index >= pixels) break;
    const Pixel at = pixel_at(args, index);
    const Scalar* z = static_cast<const Scalar*>(args.logits.data) + offset_of(args.logits, at);

    Acc m = widen(z[0]);
    for (int64_t c = 1; c < args.C; ++c) {
      const Acc value = widen(z[c * args.logits.stride_c]);
      m = value > m ? value : m;
    }
    Acc sum = 0;
    for (int64_t c = 0; c < args.C; ++c) sum += exp(widen(z[c * args.logits.stride_c]) - m);
    const Acc log_of_sum = log(sum);
    max_logit[index] = m;
    log_sum[index] = log_of_sum;

    const int label = read_label(args, at.n, at.y, at.x);
    if (label >= 0) {
      const Acc w = weight ? weight[label] : Acc(1);
      weighted_nll += w * ((m - widen(z[label * args.logits.stride_c])) + log_of_sum);
      weight_sum += w;
    } else if (label == kBad) {
      weighted_nll = nan("");  // no assert, no look from the host: the loss says it
      weight_sum += 1;
    }
  }
  const double nll_of_block = block_sum(weighted_nll, shared), weight_of_block = block_sum(weight_sum, shared);
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = nll_of_block;
    partials[gridDim.x + blockIdx.x] = weight_of_block;
  }
}

// One block adds the tiles' partial sums, each thread a fixed subset in index order.
template <typename Acc>
__global__ void __launch_bounds__(kThreads) loss_finish(LossArgs args, const double* partials, int64_t tiles) {
  __shared__ double shared[kThreads];
  double nll = 0, weight = 0;
  for (int64_t tile = threadIdx.x; tile < tiles; tile += kThreads) {
    nll += partials[tile];
    weight += partials[tiles + tile];
  }
  nll = block_sum(nll, shared);
  weight = block_sum(weight, shared);
  if (threadIdx.x == 0) {
    *static_cast<Acc*>(args.denominator) = static_cast<Acc>(weight);
    *static_cast<Acc*>(args.total) = static_cast<Acc>(weight != 0 ? nll / weight : 0);
  }
}

template <typename Scalar>
__global__ void __launch_bounds__(kThreads) loss_backward_tiles(LossArgs args) {
  using Acc = typename AccOf<Scalar>::type;
  const int64_t pixels = args.N * args.H * args.W;
  const Acc* weight = static_cast<const Acc*>(args.weight);
  const Acc* max_logit = static_cast<const Acc*>(args.stats);
  const Acc* log_sum = max_logit + pixels;
  const Acc denominator = *static_cast<const Acc*>(args.denominator);
  const Acc scale = denominator != 0 ? *static_cast<const Acc*>(args.grad_total) / denominator : Acc(0);

  for (int k = threadIdx.x; k < kTilePixels; k += kThreads) {
    const int64_t index = blockIdx.x * static_cast<int64_t>(kTilePixels) + k;
    if (index >= pixels) break;
    const Pixel at = pixel_at(args, index);
    const Scalar* z = static_cast<const Scalar*>(args.logits.data) + offset_of(args.logits, at);
    Scalar* grad = static_cast<Scalar*>(args.grad.data) + offset_of(args.grad, at);

    const int label = read_label(args, at.n, at.y, at.x);
    const Acc w = label < 0 ? Acc(0) : weight ? weight[label] : Acc(1);
    const Acc coefficient = label == kBad ? static_cast<Acc>(nan("")) : scale * w;
    const Acc m = max_logit[index], log_of_sum = log_sum[index];
    for (int64_t c = 0; c < args.C; ++c) {
      const Acc p = exp((widen(z[c * args.logits.stride_c]) - m) - log_of_sum);
      const Acc value = coefficient != 0 ? coefficient * (p - (c == label ? Acc(1) : Acc(0))) : Acc(0);
      narrow(value, grad + c * args.grad.stride_c);
    }
  }
}

}  // namespace bcmf::device
